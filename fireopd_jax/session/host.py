"""Host stages: run on a rollout between sampling and scoring, outside jit.

    rollout -> grade (by the rows' answers) -> rollout with `correct`

A host stage sets fields of the rollout that a method's stages need. It blocks on the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from fireopd_jax.evaluation.graders import grade
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.session.setup import Setup
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Rollout


@runtime_checkable
class HostStage(Protocol):
    """Sets fields of a rollout on the host."""

    gives: ClassVar[frozenset[str]]
    """The fields that are set, such as "rollout.correct"."""

    def __call__(self, rollout: Rollout) -> Rollout:
        """Return the rollout with these fields set."""
        ...


@dataclasses.dataclass(frozen=True)
class Grade:
    """Grades responses against their rows' answers: `correct` f32[B], 1 if right, else 0."""

    setup: Setup

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.correct"})

    def __call__(self, rollout: Rollout) -> Rollout:
        """Return the rollout with `correct` set; 0 for rows without a token."""
        setup = self.setup
        tokens, mask, row = jax.device_get((rollout.tokens, rollout.mask, rollout.prompts.row))
        correct = np.zeros(len(mask), np.float32)
        for i in np.flatnonzero(mask.any(axis=1)):
            answer = setup.rows[int(row[i])].answer
            assert answer is not None  # checked by `set_up`
            text = decode(setup.student.tokenizer, tokens[i][mask[i]].tolist())
            correct[i] = grade(text, answer)
        return dataclasses.replace(rollout, correct=shard_rows(setup.mesh, correct))


HOST_STAGES: Sequence[type[Grade]] = (Grade,)


def host_stages(setup: Setup, method: MethodConfig) -> list[HostStage]:
    """Return the host stages that set the rollout fields which the method needs."""
    needs = method.score.needs | method.needs
    return [stage(setup) for stage in HOST_STAGES if stage.gives & needs]
