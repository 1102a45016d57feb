"""Check that a teacher's token ids mean the student's tokens, before anything is computed.

    student, teacher -> check_teacher -> None, or an error that names the option which allows it

A teacher scores the student's token ids as they are, so an id in both vocabularies must be the same
token in both. Ids beyond a tokenizer only pad the head; they are masked out of every distribution.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError, config

Allowance = Literal["eos", "special_tokens", "template", "thinking"]

SHOWN = 4
LOGIT_FREE = (
    "methods that score tokens need one tokenizer; across tokenizers, a served teacher can write "
    "text for the logit-free method OmniOPD (configs/method/omniopd.yaml)"
)


@config
class ChecksConfig:
    """Intended differences between the student and its teachers."""

    allow: tuple[Allowance, ...] = ()
    """Differences to allow: `eos` (the tokens that end a response), `special_tokens` (special or
    added tokens), `template` (the chat template), `thinking` (the template's arguments, such as
    enable_thinking)."""


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """A model's tokenizer and the settings that decide how it is used; no parameters."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    stop: tuple[int, ...]
    """Ids that end a response, the tokenizer's own first."""
    template_kwargs: Mapping[str, Any]


def check_teacher(
    student: TokenizerFacts, teacher: TokenizerFacts, allow: Collection[str], aliased: bool = False
) -> None:
    """Raise `UserError` on a teacher with another tokenizer, or a difference not in `allow`.

    `aliased`: the teacher's EOS token is exchanged with the student's, so they may differ.
    """
    if problem := _other_tokens(student, teacher):
        raise UserError(
            f"{teacher.name}: its tokenizer ({teacher.tokenizer_name}) differs from the student's "
            f"({student.tokenizer_name}): {problem}; {LOGIT_FREE}"
        )
    for allowance, problem in _differences(student, teacher):
        if allowance not in allow and not (aliased and allowance == "eos"):
            named = ", ".join([*allow, allowance])
            hint = ", or eos_alias of that teacher" if allowance == "eos" else ""
            raise UserError(
                f"{teacher.name}: {problem}; if that is intended, set checks.allow=[{named}]{hint}"
            )


def valid_rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str) -> int | None:
    """Return the number of head rows that are tokens, or None if the head has no padding rows.

    Added tokens beyond the head, such as those of a vision tower, are never sampled; regular ones
    raise `UserError`.
    """
    vocabulary = _tokens_by_id(tokenizer)
    size = max(vocabulary) + 1
    beyond = [token for index, token in vocabulary.items() if index >= vocab_size]
    if regular := [token for token in beyond if token not in added_tokens(tokenizer)]:
        raise UserError(
            f"{source}: vocab_size={vocab_size} is less than the {size} ids of its tokenizer; "
            f"{_listed(regular)} would have no row in the head"
        )
    return size if size < vocab_size else None


def check_ids(what: str, sequences: Iterable[Int32[np.ndarray, " _"] | None], size: int) -> None:
    """Raise `UserError` on ids >= `size`: JAX would silently read another row."""
    for ids in sequences:
        if ids is not None and (largest := int(ids.max(initial=0))) >= size:
            raise UserError(f"{what} has the token id {largest}; ids must be below {size}")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that were added to the tokenizer's trained vocabulary, with their ids."""
    return tokenizer.get_added_vocab()  # pyright: ignore[reportCallIssue, reportOptionalCall]


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens in the order of their ids; that of `get_vocab` is another each time."""
    return dict(sorted((index, token) for token, index in tokenizer.get_vocab().items()))


def _other_tokens(student: TokenizerFacts, teacher: TokenizerFacts) -> str | None:
    """Return how the regular tokens differ; None if they do not, up to missing added tokens."""
    if student.tokenizer is teacher.tokenizer:
        return None
    ours, theirs = _tokens_by_id(student.tokenizer), _tokens_by_id(teacher.tokenizer)
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            return f"id {index} is {theirs[index]!r}, the student's {ours[index]!r}"
    for one, other, facts in ((theirs, ours, teacher), (ours, theirs, student)):
        added = added_tokens(facts.tokenizer)
        if alone := [token for i, token in one.items() if i not in other and token not in added]:
            return f"only {facts.name} has {_listed(alone)}"
    return None


def _differences(
    student: TokenizerFacts, teacher: TokenizerFacts
) -> Iterator[tuple[Allowance, str]]:
    """Yield each difference that may be intended, with the option that allows it."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    if student.stop[0] not in teacher.stop or teacher.stop[0] not in student.stop:
        yield (
            "eos",
            f"it ends responses with {_named(teacher, teacher.stop)}, the student with "
            f"{_named(student, student.stop)}",
        )
    if ours is not theirs:
        for problem in _special_token_differences(student, teacher):
            yield "special_tokens", problem
    if ours.chat_template != theirs.chat_template:
        yield (
            "template",
            "its chat template is not the student's (each model gets its prompt in its own "
            "template, followed by the student's response unchanged)",
        )
    for name in sorted({*student.template_kwargs, *teacher.template_kwargs}):
        mine, its = (s.template_kwargs.get(name, "unset") for s in (student, teacher))
        if mine != its and all(_uses(tokenizer, name) for tokenizer in (ours, theirs)):
            yield (
                "thinking",
                f"its chat_template_kwargs have {name}={its!r}, the student's {name}={mine!r}",
            )


def _special_token_differences(student: TokenizerFacts, teacher: TokenizerFacts) -> Iterator[str]:
    ours, theirs = _tokens_by_id(student.tokenizer), _tokens_by_id(teacher.tokenizer)
    for facts, one, other in ((teacher, theirs, ours), (student, ours, theirs)):
        if alone := [one[index] for index in sorted(one.keys() - other.keys())]:
            yield f"only {facts.name} has the added {_listed(alone)}"
    marked = _special_ids(student) ^ _special_ids(teacher)
    if unlike := sorted(marked & ours.keys() & theirs.keys()):
        yield f"{_listed([ours[i] for i in unlike])} is a special token for only one of the two"
    for role in ("bos_token", "unk_token"):
        mine, its = (getattr(s.tokenizer, role) for s in (student, teacher))
        if mine != its:
            yield f"its {role} is {its!r}, the student's {mine!r}"
    # The padding token is not compared: lengths mark the padding.


def _special_ids(facts: TokenizerFacts) -> set[int]:
    """Return the ids of the special tokens, which decoding leaves out."""
    decoder: Any = facts.tokenizer.added_tokens_decoder
    return {index for index, token in decoder.items() if token.special}


def _uses(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    template = tokenizer.chat_template
    return re.search(rf"\b{re.escape(name)}\b", str(template)) is not None


def _named(facts: TokenizerFacts, ids: Sequence[int]) -> str:
    return " or ".join(repr(facts.tokenizer.convert_ids_to_tokens(index)) for index in ids)


def _listed(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else ""
    return ", ".join(map(repr, tokens[:SHOWN])) + more
