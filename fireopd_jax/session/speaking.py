"""Text that teachers write after a prefix of a response.

    Ask (row, prefix), N -> N continuations of each prefix, as text

Whoever stands behind it: a resident teacher samples with the run's own engine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from fireopd_jax.data.pipeline import SAMPLE_IDS, pad_id, padded
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.session.contexts import teacher_specs, width_of
from fireopd_jax.session.host import Policies
from fireopd_jax.session.session import Session, generate_by_route
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prefix of a response that a teacher is to continue."""

    row: int
    """Index in the batch."""
    prefix: Sequence[int]
    """Token ids of the response before the continuation, in the student's vocabulary."""


@runtime_checkable
class Speaker(Protocol):
    """Teachers that write text."""

    def __call__(
        self, prompts: Prompts, asks: Sequence[Ask | None], policies: Policies
    ) -> list[list[str]]:
        """Return the continuations of each prefix, none where there is no `Ask`.

        `prompts` are those of the batch, on the host; `asks` has as many entries for each of its
        rows, the asks of a row by ascending length.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Continue:
    """How continuations are sampled."""

    number: int
    """Continuations of each prefix, N."""
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class ResidentSpeaker:
    """Samples continuations from the teachers on the mesh, each for the rows routed to it."""

    def __init__(self, session: Session, method: MethodConfig, how: Continue):
        self.session, self.how = session, how
        self.specs = teacher_specs(session.setup, method)
        self.response = session.setup.config.rollout.max_tokens

    def __call__(
        self, prompts: Prompts, asks: Sequence[Ask | None], policies: Policies
    ) -> list[list[str]]:
        """Return the continuations of each prefix; see `Speaker`."""
        number = self.how.number
        expanded = self._expanded(prompts, asks, len(asks) // len(prompts.row))
        drawn = generate_by_route(
            self.session,
            self.specs,
            policies.teachers,
            expanded,
            self._sampling,
            policies.updates,
            self.how.max_tokens,
        )
        texts: list[list[str]] = [[] for _ in asks]
        for at in np.flatnonzero(expanded.length).tolist():
            tokenizer = self.specs[int(expanded.teacher[at])].tokenizer
            ids = drawn.tokens[at][drawn.mask[at]].tolist()
            texts[at // number].append(decode(tokenizer, ids))
        return texts

    def _expanded(self, prompts: Prompts, asks: Sequence[Ask | None], each: int) -> Prompts:
        """Return prompts that end with the prefixes, N rows for each."""
        number = self.how.number
        # A chunk ends within a response, so that there is room for what it is compared with.
        width = width_of(prompts.teacher_tokens.shape[1] + self.response)
        whole = [None if ask is None else self._prompt(prompts, ask) for ask in asks]
        pads = [
            pad_id(self.specs[int(route)].tokenizer) for route in np.repeat(prompts.teacher, each)
        ]
        ids, length = padded(whole, width, pads)
        of_row = np.repeat(np.arange(len(prompts.row)), each * number)
        own = prompts.sample_id[of_row].astype(np.int64) * (each * number)
        own += np.tile(np.arange(each * number), len(prompts.row))
        tokens, length = np.repeat(ids, number, axis=0), np.repeat(length, number)
        return Prompts(
            tokens=tokens,
            length=length,
            teacher_tokens=tokens[:, :1],
            teacher_length=np.minimum(length, 1),
            teacher=prompts.teacher[of_row],
            row=prompts.row[of_row],
            sample_id=(own % SAMPLE_IDS).astype(np.int32),
            group=np.repeat(np.arange(len(asks), dtype=np.int32), number),
        )

    def _prompt(self, prompts: Prompts, ask: Ask) -> Int32[np.ndarray, " _"]:
        context = prompts.teacher_tokens[ask.row][: int(prompts.teacher_length[ask.row])]
        return np.concatenate([context, np.asarray(ask.prefix, np.int32)])

    def _sampling(self, spec: ModelSpec) -> Sampling:
        how = self.how
        return self.session.setup.sampling(
            "audit",
            temperature=how.temperature,
            top_p=how.top_p,
            spec=spec,
            max_tokens=how.max_tokens,
        )
