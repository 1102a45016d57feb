"""The prompts after which teachers score and write: the rows' own, or with other texts quoted.

Setup, method -> Encoded with the teacher's prompts of that method
Row, attempt, limit -> token ids of a prompt that asks for a rewrite, cut to the limit
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded
from fireopd_jax.data.sources import Row
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat import Message, decode, prompt_ids
from fireopd_jax.text.templates import CUT, asking

BLOCK = 16
"""Widths of prompts are multiples of this."""
LONGEST = 64
"""Rows of the longest texts, from which the width of prompts is derived."""


@dataclasses.dataclass(frozen=True)
class Voice:
    """A model that prompts are written for: tokenizer and chat template arguments."""

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any]
    model: str
    """Its name in errors."""

    def ids(
        self, conversations: Sequence[Sequence[Message]], rows: Sequence[Row]
    ) -> list[Int32[np.ndarray, " _"]]:
        """Return the token ids of a conversation of each row, and of the response if it is begun.

        Tools, and the beginnings of responses, are those of the rows.
        """
        begun = [row.begun for row in rows]
        found = prompt_ids(
            self.tokenizer,
            conversations,
            self.template_kwargs,
            begun=begun if any(begun) else None,
            tools=[row.tools for row in rows],
            origins=[row.origin for row in rows],
            model=self.model,
        )
        return [np.asarray(ids, np.int32) for ids in found]


def voice_of(spec: ModelSpec) -> Voice:
    """Return tokenizer and template arguments of a model."""
    return Voice(spec.tokenizer, spec.config.chat_template_kwargs, spec.name)


def teacher_specs(setup: Setup, method: MethodConfig) -> tuple[ModelSpec, ...]:
    """Return the models that score a method's responses, by route: teachers, or the student."""
    if method.teacher.own:
        return (setup.student,)
    return setup.teachers if method.teacher.resident else ()


def teacher_names(setup: Setup, method: MethodConfig) -> tuple[str, ...]:
    """Return the names of a method's teachers, by route."""
    if method.teacher.own:
        return ("student",)
    if not method.teacher.resident:
        return ()
    resident = tuple(spec.name.removeprefix("teacher ") for spec in setup.teachers)
    return resident or tuple(teacher.name for teacher in setup.served)


def teacher_voices(setup: Setup, method: MethodConfig) -> list[Voice]:
    """Return tokenizers and template arguments of a method's teachers, by route."""
    served = setup.served if method.teacher.resident else ()
    return [voice_of(spec) for spec in teacher_specs(setup, method)] + [
        Voice(teacher.tokenizer, teacher.config.chat_template_kwargs, f"teacher {teacher.name}")
        for teacher in served
    ]


def encoded_for(setup: Setup, method: MethodConfig) -> Encoded:
    """Return the rows with the teacher's prompts of a method; rows that lack a text are not kept.

    Raises UserError if no training row is left, or if a prompt does not fit into a model.
    """
    encoded, teacher = setup.encoded, method.teacher
    specs = teacher_specs(setup, method)
    if not teacher.resident:
        encoded = dataclasses.replace(
            encoded,
            teacher_prompts=list(encoded.prompts),
            route=np.zeros_like(encoded.route),
            teacher_pads=(encoded.pad,),
        )
    if method.privileged:
        told = [i for i in encoded.kept if setup.rows[i].privileged is not None]
        encoded = dataclasses.replace(encoded, kept=np.asarray(told, np.int64))
        if not np.isin(setup.train, encoded.kept).any():
            raise UserError(
                f"{setup.rows[int(setup.train[0])].origin}: no row has the solution that "
                "method.teacher.prompt or method.refine.prompt quotes; name its column as "
                "data.privileged_column"
            )
    if teacher.prompt is None:
        return encoded
    prompts = list(encoded.teacher_prompts)
    for route, voice in enumerate(teacher_voices(setup, method)):
        own = [int(i) for i in encoded.kept if encoded.route[i] == route]
        rows = [setup.rows[i] for i in own]
        asked = [with_privileged(row, teacher.prompt) for row in rows]
        for index, ids in zip(own, voice.ids(asked, rows), strict=True):
            prompts[index] = ids
    lengths = np.asarray([len(prompts[i]) for i in encoded.kept])
    limit = teacher.max_prompt_tokens or int(lengths.max())
    kept = encoded.kept[lengths <= limit]
    if not np.isin(setup.train, kept).any():
        raise UserError(
            f"method.teacher.max_prompt_tokens={limit}: none of {len(lengths)} prompts of the "
            f"teacher fits, the shortest has {lengths.min()} tokens"
        )
    for spec in specs:
        check_context(spec, limit, setup.config.rollout.max_tokens, "method.teacher")
    return dataclasses.replace(
        encoded, teacher_prompts=prompts, kept=kept, max_teacher_prompt_tokens=width_of(limit)
    )


def with_privileged(row: Row, text: str, attempt: str = "") -> tuple[Message, ...]:
    """Return a row's conversation with problem, privileged solution and attempt in a template."""
    return asking(row.prompt, text, {"reference": row.privileged or "", "attempt": attempt})


def width_of(limit: int) -> int:
    """Return the width of the array that holds prompts of up to `limit` tokens."""
    return -(-limit // BLOCK) * BLOCK


def check_context(spec: ModelSpec, longest: int, max_tokens: int, section: str) -> None:
    """Raise UserError where prompts of `longest` tokens leave a model no room for responses."""
    limit = spec.model.config.max_position_embeddings
    if limit is not None and longest + max_tokens > limit:
        raise UserError(
            f"{spec.name}: prompts of {longest} tokens ({section}.max_prompt_tokens) and "
            f"responses of {max_tokens} make {longest + max_tokens}, more than the model's "
            f"{limit} (max_position_embeddings)"
        )


@dataclasses.dataclass(frozen=True)
class Quoting:
    """Writes prompts that quote a response, and cuts the quotations until they fit."""

    voice: Voice
    text: str
    """A template, or the name of one."""
    limit: int
    """Longest prompt in tokens."""
    attempt_tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the quoted responses."""

    def __call__(self, row: Row, attempt: Sequence[int]) -> Int32[np.ndarray, " _"] | None:
        """Return the prompt's token ids, None if it does not fit without quotations either.

        The end of the response is cut first, then the end of the privileged solution.
        """
        whole = self._ids(row, attempt, None)
        if len(whole) <= self.limit:
            return whole
        fits = self._longest(len(attempt), lambda size: self._ids(row, attempt[:size], None, True))
        if fits is not None:
            return fits
        solution = row.privileged or ""
        return self._longest(
            len(solution), lambda size: self._ids(row, (), solution[:size] + CUT, True)
        )

    def _longest(self, most: int, ids: Any) -> Int32[np.ndarray, " _"] | None:
        """Return `ids(size)` of the largest size that fits, found by bisection."""
        low, high, best = 0, most, None
        while low <= high:
            middle = (low + high) // 2
            found = ids(middle)
            if len(found) <= self.limit:
                low, best = middle + 1, found
            else:
                high = middle - 1
        return best

    def _ids(
        self, row: Row, attempt: Sequence[int], solution: str | None, cut: bool = False
    ) -> Int32[np.ndarray, " _"]:
        quoted = decode(self.attempt_tokenizer, attempt)
        fields = {
            "attempt": f"{quoted}{CUT}" if cut else quoted,
            "reference": (row.privileged or "") if solution is None else solution,
        }
        return self.voice.ids([asking(row.prompt, self.text, fields)], [row])[0]


def longest_quoting(setup: Setup, method: MethodConfig, text: str) -> int:
    """Return a length in tokens that is enough for the prompts that quote any row's response.

    Where it is not, as with another tokenizer, quotations are cut.
    """
    rows = sorted((setup.rows[i] for i in setup.encoded.kept), key=_characters)[-LONGEST:]
    bare = [with_privileged(row, text) for row in rows]
    longest = max(
        len(ids) for spec in teacher_specs(setup, method) for ids in voice_of(spec).ids(bare, rows)
    )
    return longest + setup.config.rollout.max_tokens


def _characters(row: Row) -> int:
    return sum(len(turn["content"]) for turn in row.prompt) + len(row.privileged or "")
