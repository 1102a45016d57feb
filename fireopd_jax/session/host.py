"""Host stages: run on a rollout between sampling and score, outside jit.

    rollout, policies -> host stage -> rollout with more fields

A host stage sets the fields of the rollout that it declares. It blocks on the device.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float32

from fireopd_jax.data.sources import Row
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.models.language_model import Params
from fireopd_jax.session.session import Session
from fireopd_jax.session.setup import Setup
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.text.graders import grade
from fireopd_jax.types import Array, Rollout


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
    setup: Setup, rollout: Rollout, value: Callable[[str, Row], float]
) -> Float32[np.ndarray, " B"]:
    """Return `value(text, row)` of each response; 0 for rows without a token."""
    tokens, mask, row = jax.device_get((rollout.tokens, rollout.mask, rollout.prompts.row))
    out = np.zeros(len(mask), np.float32)
    for i in np.flatnonzero(mask.any(axis=1)):
        text = decode(setup.student.tokenizer, tokens[i][mask[i]].tolist())
        out[i] = value(text, setup.rows[int(row[i])])
    return out


def is_right(text: str, row: Row) -> bool:
    """Return whether a response has its row's answer, which `set_up` has checked to exist."""
    assert row.answer is not None
    return grade(text, row.answer)


class Grade:
    """Grades responses against their rows' answers: `correct` f32[B], 1 if right, else 0."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.correct"})

    def __init__(self, session: Session, method: MethodConfig):
        self.session = session

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with `correct` set; 0 for rows without a token."""
        setup = self.session.setup
        correct = each_response(setup, rollout, is_right)
        return dataclasses.replace(rollout, correct=shard_rows(setup.mesh, correct))


class FindLeaks:
    """Finds responses that speak of privileged information: `leaked` bool[B]."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.leaked"})

    def __init__(self, session: Session, method: MethodConfig):
        assert method.teacher.leak is not None
        self.session = session
        self.pattern, self.drop = re.compile(method.teacher.leak.pattern), method.teacher.leak.drop

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with `leaked` set; with `drop`, without the tokens of such rows."""
        setup = self.session.setup
        found = each_response(setup, rollout, lambda text, row: bool(self.pattern.search(text)))
        leaked = shard_rows(setup.mesh, found > 0)
        mask = rollout.mask & ~leaked[:, None] if self.drop else rollout.mask
        return dataclasses.replace(rollout, leaked=leaked, mask=mask)
