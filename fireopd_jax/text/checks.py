"""Whether a teacher's words mean the student's: checked from files alone, before any compute.

    student, teacher -> check_teacher -> nothing, or one line that names the option which allows it

A teacher scores the student's token ids as they are. So every id that both know must be the same
token; ids that no tokenizer knows only pad the head, and no model ever gives them probability.
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
    "methods that score tokens need one tokenizer; across tokenizers, the logit-free method "
    "OmniOPD is planned, not built yet"
)


@config
class ChecksConfig:
    """What may differ between the student and its teachers, when it is meant."""

    allow: tuple[Allowance, ...] = ()
    """`eos` (how a response ends), `special_tokens` (a special or an added token), `template` (the
    chat template), `thinking` (its arguments, such as enable_thinking)."""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """What there is to compare in a model before its parameters are read."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    stop: tuple[int, ...]
    """Ids that end a response, its usual one first."""
    template_kwargs: Mapping[str, Any]


def check_teacher(
    student: Speaker, teacher: Speaker, allow: Collection[str], aliased: bool = False
) -> None:
    """Refuse a teacher of another tokenizer, and a difference that `allow` does not name.

    `aliased`: its end stands for the student's, so that they may differ.
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
                f"{teacher.name}: {problem}; if that is meant, set checks.allow=[{named}]{hint}"
            )


def valid_rows(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str) -> int | None:
    """Count the rows of a head that are tokens; None where all are: nothing pads it.

    Added tokens beyond the head, such as those of a model's vision part, are never drawn.
    """
    words = tokenizer.get_vocab()
    size = max(words.values()) + 1
    beyond = [word for word, index in words.items() if index >= vocab_size]
    if regular := [word for word in beyond if word not in added_words(tokenizer)]:
        raise UserError(
            f"{source}: vocab_size={vocab_size} is less than the {size} ids of its tokenizer; "
            f"{_listed(regular)} would have no row"
        )
    return size if size < vocab_size else None


def check_ids(what: str, sequences: Iterable[Int32[np.ndarray, " _"] | None], size: int) -> None:
    """Refuse token ids that have no row: JAX would silently read another."""
    for ids in sequences:
        if ids is not None and (largest := int(ids.max(initial=0))) >= size:
            raise UserError(f"{what} holds the token id {largest}, beyond the {size} ids there are")


def added_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """List the tokens that were added to a trained vocabulary."""
    return tokenizer.get_added_vocab()  # pyright: ignore[reportCallIssue, reportOptionalCall]


def _words(speaker: Speaker) -> dict[int, str]:
    return {index: word for word, index in speaker.tokenizer.get_vocab().items()}


def _other_tokens(student: Speaker, teacher: Speaker) -> str | None:
    """Say where regular tokens differ; added tokens that one side lacks are no matter of this."""
    if student.tokenizer is teacher.tokenizer:
        return None
    ours, theirs = _words(student), _words(teacher)
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            return f"id {index} is {theirs[index]!r}, the student's {ours[index]!r}"
    for one, other, speaker in ((theirs, ours, teacher), (ours, theirs, student)):
        added = added_words(speaker.tokenizer)
        if alone := [word for i, word in one.items() if i not in other and word not in added]:
            return f"only {speaker.name} has {_listed(alone)}"
    return None


def _differences(student: Speaker, teacher: Speaker) -> Iterator[tuple[Allowance, str]]:
    """List what may differ on purpose: the option that allows it, and what differs."""
    ours, theirs = student.tokenizer, teacher.tokenizer
    if student.stop[0] not in teacher.stop or teacher.stop[0] not in student.stop:
        yield (
            "eos",
            f"it ends responses with {_named(teacher, teacher.stop)}, the student with "
            f"{_named(student, student.stop)}",
        )
    if ours is not theirs:
        for problem in _special(student, teacher):
            yield "special_tokens", problem
    if ours.chat_template != theirs.chat_template:
        yield (
            "template",
            "its chat template is not the student's (each reads its own; the student's response "
            "follows as it is)",
        )
    for name in sorted({*student.template_kwargs, *teacher.template_kwargs}):
        mine, its = (s.template_kwargs.get(name, "unset") for s in (student, teacher))
        if mine != its and all(_uses(tokenizer, name) for tokenizer in (ours, theirs)):
            yield (
                "thinking",
                f"its chat_template_kwargs have {name}={its!r}, the student's {name}={mine!r}",
            )


def _special(student: Speaker, teacher: Speaker) -> Iterator[str]:
    ours, theirs = _words(student), _words(teacher)
    for speaker, one, other in ((teacher, theirs, ours), (student, ours, theirs)):
        if alone := [one[index] for index in sorted(one.keys() - other.keys())]:
            yield f"only {speaker.name} has the added {_listed(alone)}"
    marked, its = _marked(student), _marked(teacher)
    if unlike := sorted((marked ^ its) & ours.keys() & theirs.keys()):
        yield f"{_listed([ours[i] for i in unlike])} is special to one and plain to the other"
    for role in ("bos_token", "unk_token"):
        mine, word = (getattr(s.tokenizer, role) for s in (student, teacher))
        if mine != word:
            yield f"its {role} is {word!r}, the student's {mine!r}"
    # The padding token plays no part: lengths tell what is padding.


def _marked(speaker: Speaker) -> set[int]:
    """Collect the ids that decoding leaves out."""
    decoder: Any = speaker.tokenizer.added_tokens_decoder
    return {index for index, token in decoder.items() if token.special}


def _uses(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    template = tokenizer.chat_template
    return re.search(rf"\b{re.escape(name)}\b", str(template)) is not None


def _named(speaker: Speaker, ids: Sequence[int]) -> str:
    return " or ".join(repr(speaker.tokenizer.convert_ids_to_tokens(index)) for index in ids)


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(map(repr, words[:SHOWN])) + more
