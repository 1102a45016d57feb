"""The source of the student's scores: the decoding steps of the rollout, or a forward pass.

    Config, method -> what rules the decoding steps out -> method.score.student: decode | forward

A decoding step has the logits that the score stage would compute again, but of the parameters that
drew the token, and of the sampled tokens only.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.scoring.teachers import ScoreOptions

if TYPE_CHECKING:
    from fireopd_jax.recipe.schema import Config


def obstacles(config: "Config", method: MethodConfig) -> Iterator[str]:
    """Yield each key, with the reason, for which a method cannot use the decoding steps' scores."""
    rollout, score, run = config.rollout, method.score, config.run
    if rollout.on_policy_fraction < 1:
        yield f"rollout.on_policy_fraction={rollout.on_policy_fraction}: references are not sampled"
    if rollout.window > 1:
        yield f"rollout.window={rollout.window}: the student is updated before it is scored"
    if rollout.overprovision:
        yield (
            f"rollout.overprovision={rollout.overprovision:g}: some tokens are of the parameters "
            "of earlier steps"
        )
    if run.updates_per_rollout > 1:
        yield (
            f"run.updates_per_rollout={run.updates_per_rollout}: later updates are compared with "
            "the student's forward pass"
        )
    if score.temperature not in (None, rollout.temperature):
        yield (
            f"method.score.temperature={score.temperature}: tokens are sampled at "
            f"rollout.temperature={rollout.temperature}"
        )
    if score.of_student(ScoreOptions()) != ScoreOptions():
        yield (
            f"method.score.kind={score.kind}: it needs more of the student than the sampled "
            "tokens' log-probabilities"
        )
    if method.refine.rewrites or "rollout.audit" in method.refine.gives:
        yield f"method.refine.kind={method.refine.kind}: it replaces or scores the responses itself"
    served = [name for name, each in config.teachers.items() if each.served is not None]
    if served and method.teacher.resident and score.scores_teacher:
        yield f"teachers.{served[0]}.served: the student is scored before the teacher is asked"


def inexact(config: "Config", dtype: str) -> Iterator[str]:
    """Yield each key for which the decoding steps' scores differ by more than float32 rounding."""
    if dtype != "float32":
        yield f"the student computes in {dtype}"
    if config.rollout.cache.dtype != "model":
        yield f"rollout.cache.dtype={config.rollout.cache.dtype}"


def with_student_scores(
    config: "Config", method: MethodConfig, dtype: str
) -> tuple[MethodConfig, str | None]:
    """Return the method with `score.student` chosen, and the reason against `decode`, if any.

    `dtype` is the student's compute dtype.
    """
    if method.score.student is not None:
        return method, None
    reason = next(iter((*obstacles(config, method), *inexact(config, dtype))), None)
    score = dataclasses.replace(method.score, student="forward" if reason else "decode")
    return dataclasses.replace(method, score=score), reason
