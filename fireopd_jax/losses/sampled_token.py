"""Losses that see the model only at the token it sampled.

    student logprob (with gradient), batch -> loss f32[B, T]

The loss is not weighted: `batch.total_loss` multiplies by weight and coefficient.
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Float32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.types import Array, Batch, TokenStats

LOG_RATIO = 20.0
"""Bound on log-ratios before exp: e^20 is still far from float32's overflow."""


@config
class SampledReverseKL:
    """Estimate KL(student || teacher) on the student's own tokens, as a clipped policy gradient.

    A = log pi_T - log pi_old, r = pi_theta / pi_old, l = max(-A r, -A clip(r, 1 - eps, 1 + eps)).
    With one update a rollout r is 1 and the gradient is -A grad log pi_theta.

    References: arXiv 2606.02684, Eq. 1-3; arXiv 1707.06347 for the clipped surrogate.
    """

    kind: Literal["sampled_reverse_kl"] = "sampled_reverse_kl"
    """Name of this loss."""
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    """How far eps the ratio r may leave 1 before its gradient stops."""
    importance_cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Cap of the correction pi_old / pi_rollout for a sampler that differs from the scored policy;
    null applies no correction."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each response token, exactly 0 in value and gradient elsewhere.

        Tokens without a share of the loss (coefficient 0) have their value but no gradient.
        """
        mask = batch.rollout.mask

        def valid(value: Array) -> Array:
            return jnp.where(mask, value, 0.0)

        # total_loss gives a dropped token the cotangent 0, and 0 times a NaN advantage is NaN.
        live = batch.coefficient != 0
        logprob = valid(jnp.where(live, student.logprob, stop_gradient(student.logprob)))
        old = stop_gradient(valid(batch.scores.student.logprob))
        loss = sampled_reverse_kl(logprob, old, valid(batch.scores.teacher.logprob), self.clip)
        if self.importance_cap is not None:
            importance = _bounded_exp(old - stop_gradient(valid(batch.rollout.logprob)))
            loss = loss * jnp.minimum(importance, self.importance_cap)
        return valid(loss)


def sampled_reverse_kl(
    logprob: Float32[Array, "B T"],
    old_logprob: Float32[Array, "B T"],
    teacher_logprob: Float32[Array, "B T"],
    clip: float = 0.2,
) -> Float32[Array, "B T"]:
    """Return max(-A r, -A clip(r, 1 - eps, 1 + eps)), A = log pi_T - log pi_old, r = pi / pi_old.

    Only `logprob` carries a gradient.
    """
    old_logprob, teacher_logprob = stop_gradient((old_logprob, teacher_logprob))
    advantage = teacher_logprob - old_logprob
    ratio = _bounded_exp(logprob - old_logprob)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return jnp.maximum(-advantage * ratio, -advantage * clipped)


def _bounded_exp(log_ratio: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO, LOG_RATIO))
