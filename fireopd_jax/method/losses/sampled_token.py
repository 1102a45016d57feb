"""Losses that use only the log-probability of the sampled token.

    student logprob (with gradient), batch -> loss f32[B, T]

The loss is unweighted: `batch.total_loss` multiplies by weight and coefficient. rho = log p/q of
a sampled token is the k1 estimator of KL(student || teacher): used as a reward it has that
divergence's gradient, as a loss its expected gradient is 0. k2 = rho^2 / 2 as a loss has it. k3 as
a loss has the gradient of the *forward* KL, and as a reward that of neither: it is not offered.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Bool, Float32, Int32
from pydantic import Field

from fireopd_jax.config import Section, UnitInterval, config
from fireopd_jax.method.losses.base import ExactDivergence, TokenLoss
from fireopd_jax.ops.formulas import ReverseKL
from fireopd_jax.types import Array, Batch, TokenStats

LOG_RATIO = 20.0
"""Bound on log-ratios before exp, so that float32 does not overflow."""

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@config
class SampledReverseKL(Section, TokenLoss):
    """Estimate KL(student || teacher) on the student's own tokens, as a clipped policy gradient.

    A = log pi_T - log pi_old, r = pi_theta / pi_old, l = max(-A r, -A clip(r, 1 - eps, 1 + eps)).
    With one update per rollout, r is 1 and the gradient is -A grad log pi_theta.

    References: arXiv 2606.02684, Eq. 1-3; arXiv 1707.06347 for the clipped surrogate; for the exact
    baseline arXiv 2605.07865; for `gamma` arXiv 2603.25562, where more than 0 only adds variance;
    for `floor` arXiv 2603.11137.
    """

    kind: Literal["sampled_reverse_kl"] = "sampled_reverse_kl"
    """Name of this loss."""
    clip: Above0 = 0.2
    """Clipping range eps of the ratio r: beyond 1 +- eps its gradient is 0."""
    importance_cap: Above0 | None = None
    """Upper bound of the importance weight pi_old / pi_rollout, which corrects for a sampler that
    differs from the scored policy; null applies no correction."""
    extrapolation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """lambda of A = lambda (log pi_T - log b) - (log pi_old - log b), b the base policy; at 1 the
    base policy cancels."""
    floor: Finite | None = None
    """Lower bound that advantages are clipped to; null is none."""
    ceiling: Finite | None = None
    """Upper bound that advantages are clipped to; null is none."""
    baseline: Literal["none", "exact_kl"] = "none"
    """`exact_kl` adds the exact KL over the whole vocabulary to A, which subtracts A's mean: the
    expected gradient is the same, its variance lower."""
    gamma: UnitInterval = 0.0
    """Discount of later advantages: A_t + gamma A_t+1 + gamma^2 A_t+2 ..."""
    margin: bool = False
    """Add the shift of `method.score.margin`, which separates right from wrong responses, to A."""

    on_policy: ClassVar[bool] = True
    corrected_by: ClassVar[str | None] = "importance_cap"

    @property
    def unfiltered(self) -> bool:
        """Whether the loss requires an unfiltered sampler: without the importance correction."""
        return self.importance_cap is None

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield `floor` where the ceiling is no higher: every advantage equals the ceiling."""
        if self.floor is not None and self.ceiling is not None and self.floor >= self.ceiling:
            yield "floor", "with a ceiling that is no higher"

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the scores that the loss uses."""
        needs = {"teacher.logprob", "student.logprob"}
        if self.extrapolation != 1:
            needs |= {"base.logprob"}
        if self.margin:
            needs |= {"margin"}
        return frozenset(needs | ({"teacher.hidden"} if self.exact_divergence else set()))

    @property
    def exact_divergence(self) -> ExactDivergence | None:
        """The reverse KL, where it is the baseline."""
        return ExactDivergence(ReverseKL()) if self.baseline == "exact_kl" else None

    @property
    def whole_rows(self) -> bool:
        """Whether a token's loss depends on others of its row: later ones, with a discount."""
        return self.gamma != 0

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each response token, exactly 0 in value and gradient elsewhere.

        Tokens with coefficient 0 have their value but no gradient.
        """
        mask = batch.rollout.mask

        def valid(value: Array) -> Array:
            return jnp.where(mask, value, 0.0)

        logprob = valid(live(student.logprob, batch))
        old = stop_gradient(valid(batch.scores.student.logprob))
        advantage = self._advantage(student, batch, old, valid)
        loss = clipped_surrogate(advantage, logprob, old, self.clip)
        if self.importance_cap is not None:
            importance = bounded_exp(old - stop_gradient(valid(batch.rollout.logprob)))
            loss = loss * jnp.minimum(importance, self.importance_cap)
        return valid(loss)

    def _advantage(self, student: TokenStats, batch: Batch, old: Array, valid) -> Array:
        scores = stop_gradient(batch.scores)
        advantage = valid(scores.teacher_stats.logprob) - old
        if self.extrapolation != 1:
            if scores.base is None:
                raise ValueError("extrapolation needs the base policy's scores: method.score.base")
            of_base = valid(scores.teacher_stats.logprob - scores.base.logprob)
            advantage = advantage + (self.extrapolation - 1) * of_base
        if self.baseline == "exact_kl":
            if student.divergence is None:
                raise ValueError("baseline exact_kl needs the divergence: TokenStats.divergence")
            advantage = advantage + valid(stop_gradient(student.divergence))
        if self.margin:
            if scores.margin is None:
                raise ValueError("margin needs graded responses: method.score.margin")
            advantage = advantage + valid(of_tokens(scores.margin.shift))
        if self.floor is not None or self.ceiling is not None:
            advantage = jnp.clip(advantage, self.floor, self.ceiling)
        if self.gamma:
            advantage = reward_to_go(valid(advantage), self.gamma, batch.row)
        return advantage


@config
class SampledSquare(TokenLoss):
    """The k2 estimator as a loss: l = (log pi_theta - log pi_T)^2 / 2.

    Its gradient (log pi_theta - log pi_T) grad log pi_theta is in expectation that of
    KL(student || teacher); its value is not an estimate of that divergence.
    """

    kind: Literal["sampled_square"] = "sampled_square"
    """Name of this loss."""
    importance_cap: Above0 | None = None
    """Upper bound of the importance weight pi_old / pi_rollout, which corrects for a sampler that
    differs from the scored policy; null applies no correction."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})
    on_policy: ClassVar[bool] = True
    corrected_by: ClassVar[str | None] = "importance_cap"

    @property
    def unfiltered(self) -> bool:
        """Whether the loss requires an unfiltered sampler: without the importance correction."""
        return self.importance_cap is None

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each response token, exactly 0 in value and gradient elsewhere."""
        mask = batch.rollout.mask
        scores = stop_gradient(batch.scores)
        teacher = jnp.where(mask, scores.teacher_stats.logprob, 0.0)
        rho = jnp.where(mask, live(student.logprob, batch), 0.0) - teacher
        loss = rho**2 / 2
        if self.importance_cap is not None:
            drift = jnp.where(mask, scores.student.logprob - batch.rollout.logprob, 0.0)
            loss = loss * jnp.minimum(bounded_exp(drift), self.importance_cap)
        return jnp.where(mask, loss, 0.0)


@config
class SampledPower(TokenLoss):
    """The sampled reverse KL with a bounded advantage, the difference of powered probabilities.

    A = pi_T^alpha - pi_old^alpha of the sampled token, between -1 and 1 and of the sign of the
    log-ratio; l = max(-A r, -A clip(r, 1 - eps, 1 + eps)). In the mean over the tokens its gradient
    is that of the Bregman divergence of x^(alpha + 1) / (alpha + 1) from pi_theta to pi_T.

    References: arXiv 2606.17199 (PowerOPD), Eq. 4, and its code.
    """

    kind: Literal["sampled_power"] = "sampled_power"
    """Name of this loss."""
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Power of both probabilities; the larger, the less tokens of low probability count."""
    normalise: bool = False
    """Divide by alpha: the difference of two Box-Cox transforms (x^alpha - 1) / alpha, at alpha = 0
    the log-ratio. The paper's equation and its code do not divide."""
    clip: Above0 = 0.2
    """Clipping range eps of the ratio r: beyond 1 +- eps its gradient is 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})
    on_policy: ClassVar[bool] = True
    unfiltered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ValueError for settings with which every advantage is 0."""
        if self.alpha == 0 and not self.normalise:
            raise ValueError(
                "alpha=0: every advantage is 0; expected alpha above 0, or normalise=true for the "
                "limit, the log-ratio"
            )

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each response token, exactly 0 in value and gradient elsewhere."""
        mask, scores = batch.rollout.mask, stop_gradient(batch.scores)
        logprob = jnp.where(mask, live(student.logprob, batch), 0.0)
        old = jnp.where(mask, scores.student.logprob, 0.0)
        teacher = jnp.where(mask, scores.teacher_stats.logprob, 0.0)
        if self.alpha == 0:
            advantage = teacher - old
        else:
            advantage = power_difference(teacher, old, self.alpha)
            advantage = advantage / self.alpha if self.normalise else advantage
        return jnp.where(mask, clipped_surrogate(advantage, logprob, old, self.clip), 0.0)


def power_difference(log_a: Array, log_b: Array, alpha: float) -> Array:
    """Return a^alpha - b^alpha from log a and log b, without cancellation where they are close."""
    gap = log_a - log_b
    larger = jnp.exp(alpha * jnp.maximum(log_a, log_b))
    return -jnp.sign(gap) * larger * jnp.expm1(-alpha * jnp.abs(gap))


def sampled_reverse_kl(
    logprob: Float32[Array, "B T"],
    old_logprob: Float32[Array, "B T"],
    teacher_logprob: Float32[Array, "B T"],
    clip: float = 0.2,
) -> Float32[Array, "B T"]:
    """Return max(-A r, -A clip(r, 1 - eps, 1 + eps)), A = log pi_T - log pi_old, r = pi / pi_old.

    Only `logprob` carries a gradient.
    """
    return clipped_surrogate(teacher_logprob - old_logprob, logprob, old_logprob, clip)


def clipped_surrogate(
    advantage: Float32[Array, "B T"],
    logprob: Float32[Array, "B T"],
    old_logprob: Float32[Array, "B T"],
    clip: float,
) -> Float32[Array, "B T"]:
    """Return max(-A r, -A clip(r, 1 - eps, 1 + eps)); only `logprob` carries a gradient."""
    advantage, old_logprob = stop_gradient((advantage, old_logprob))
    ratio = bounded_exp(logprob - old_logprob)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return jnp.maximum(-advantage * ratio, -advantage * clipped)


def reward_to_go(
    reward: Float32[Array, "B T"],
    gamma: float | Float32[Array, ""],
    row: Int32[Array, "B T"] | None = None,
) -> Float32[Array, "B T"]:
    """Return R_t = r_t + gamma R_t+1 along each row; rewards after the last token must be 0.

    With `row`, the row of each token of packed rows, R_t = r_t at the last token of each.
    """
    later = jnp.full_like(reward, gamma)
    if row is not None:
        ends = jnp.zeros_like(row[:, :1], bool)
        later = jnp.where(jnp.concatenate([row[:, 1:] == row[:, :-1], ends], axis=1), later, 0.0)

    def step(after: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        total = now[0] + now[1] * after
        return total, total

    _, totals = jax.lax.scan(step, jnp.zeros_like(reward[:, 0]), (reward.T, later.T), reverse=True)
    return totals.T


def mean_of_later(
    reward: Float32[Array, "B T"],
    mask: Bool[Array, "B T"],
    row: Int32[Array, "B T"] | None = None,
) -> Array:
    """Return, f32[B, T], the mean reward of the later tokens of the row; 0 at the last token."""
    reward, count = jnp.where(mask, reward, 0.0), jnp.asarray(mask).astype(jnp.float32)
    later, number = (reward_to_go(each, 1.0, row) - each for each in (reward, count))
    return jnp.where(number > 0, later / jnp.maximum(number, 1.0), 0.0)


def of_tokens(values: Float32[Array, " B"] | Float32[Array, "B T"]) -> Float32[Array, "B _"]:
    """Return values of rows as values of tokens, which they are already where rows are packed."""
    return values if values.ndim == 2 else values[:, None]


def live(value: Array, batch: Batch) -> Array:
    """Return `value` with the gradient stopped at tokens whose coefficient is 0.

    `total_loss` gives such a token the cotangent 0, and 0 times a NaN advantage is NaN.
    """
    share = batch.coefficient != 0
    share = share[..., None] if value.ndim > share.ndim else share
    return jnp.where(share, value, stop_gradient(value))


def bounded_exp(log_ratio: Array) -> Array:
    """Return e^x with x clipped to [-20, 20]."""
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO, LOG_RATIO))
