"""Host stages: run on a rollout between sampling and score, outside jit.

    rollout, policies -> host stage -> rollout with more fields

A host stage sets the fields of the rollout that it declares. It blocks on the device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import regex
from jaxtyping import Float32

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.graders import verdicts
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.models.language_model import Params
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.session.session import Session
from fireopd_jax.session.setup import Setup
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Array, Rollout

SEARCH_S = 5.0
"""Seconds that a pattern may search one response."""


@dataclasses.dataclass(frozen=True)
class Policies:
    """Parameters of the models of a step, which a host stage may sample from or score with."""

    student: Params
    teachers: Sequence[Params]
    """Of the method's teachers by route; of one that is the student itself, its parameters."""
    updates: Array
    """Number of updates so far."""


@runtime_checkable
class HostStage(Protocol):
    """Sets fields of a rollout on the host."""

    gives: ClassVar[frozenset[str]]
    """The fields that are set, such as "rollout.correct"."""

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with these fields set."""
        ...


def each_response(
    setup: Setup, rollout: Rollout, value: Callable[[str, int], float]
) -> Float32[np.ndarray, " B"]:
    """Return `value(text, row index)` of each response; 0 for rows without a token."""
    return all_responses(setup, rollout, lambda texts, rows: map(value, texts, rows))


def all_responses(
    setup: Setup, rollout: Rollout, values: Callable[[list[str], list[int]], Iterable[float]]
) -> Float32[np.ndarray, " B"]:
    """Return `values(texts, row indices)` of the responses; 0 for rows without a token."""
    tokens, mask, row = fetched((rollout.tokens, rollout.mask, rollout.prompts.row))
    out = np.zeros(len(mask), np.float32)
    real = np.flatnonzero(mask.any(axis=1))
    texts = [decode(setup.student.tokenizer, tokens[i][mask[i]].tolist()) for i in real]
    out[real] = list(values(texts, row[real].tolist()))
    return out


def correct(setup: Setup, rollout: Rollout) -> Float32[np.ndarray, " B"]:
    """Return the grade of each response, 1 or 0, by answers that `set_up` has checked to exist.

    A response that the data begins is graded as a whole.
    """

    def grades(texts: list[str], indices: list[int]) -> list[float]:
        rows = [setup.rows[index] for index in indices]
        whole = [row.begun + text for row, text in zip(rows, texts, strict=True)]
        kinds = [setup.grader(index) for index in indices]
        found = verdicts(whole, [row.answer or "" for row in rows], kinds)
        return [float(each.correct) for each in found]

    return all_responses(setup, rollout, grades)


class Grade:
    """Grades responses against their rows' answers: `correct` f32[B], 1 if right, else 0."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.correct"})

    def __init__(self, session: Session, method: MethodConfig):
        self.session = session

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with `correct` set; 0 for rows without a token."""
        setup = self.session.setup
        grades = shard_rows(setup.mesh, correct(setup, rollout))
        return dataclasses.replace(rollout, correct=grades)


class FindLeaks:
    """Finds responses that speak of privileged information: `leaked` bool[B]."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.leaked"})

    def __init__(self, session: Session, method: MethodConfig):
        assert method.teacher.leak is not None
        self.session = session
        leak = method.teacher.leak
        # Not `re`, which cannot be stopped: some patterns take ages for some texts.
        self.pattern, self.drop = regex.compile(leak.pattern), leak.drop

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with `leaked` set; with `drop`, without the tokens of such rows."""
        setup = self.session.setup
        found = each_response(setup, rollout, lambda text, row: self.leaks(text))
        leaked = shard_rows(setup.mesh, found > 0)
        mask = rollout.mask & ~leaked[:, None] if self.drop else rollout.mask
        return dataclasses.replace(rollout, leaked=leaked, mask=mask)

    def leaks(self, text: str) -> bool:
        """Return whether a response matches; raise UserError for a pattern that takes too long."""
        try:
            return self.pattern.search(text, timeout=SEARCH_S) is not None
        except TimeoutError:
            raise UserError(
                f"method.teacher.leak.pattern: no answer within {SEARCH_S:g} s for a response of "
                f"{len(text)} characters; expected a pattern without nested repetitions"
            ) from None
