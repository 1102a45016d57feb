"""Filters of single tokens, by the scores of student and teacher.

scores, context -> keep bool[B, T]
"""

import math
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.stage import StatelessFilter
from fireopd_jax.ops.ranks import masked_quantile, ranks
from fireopd_jax.types import Array, Scores, StageContext

Share = Annotated[float, Field(gt=0, le=1)]
CLIPPED = 0.98
"""Quantile over the batch at which TIP clips the student's entropy."""


@config
class Reopold(StatelessFilter):
    """Select tokens in two phases: by advantage first, by the student's entropy later.

    With R = log pi_T - log pi_S, the first phase keeps tokens with R >= (ln lambda) / (1 - lambda);
    the second keeps those whose student entropy is at least the (1 - beta)-quantile over all
    response tokens of the batch, linearly interpolated.

    References: arXiv 2603.11137.
    """

    kind: Literal["reopold"] = "reopold"
    """Name of this filter."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """lambda of the first phase: 0.1 keeps advantages of -2.56 nats or more."""
    entropy_fraction: Share = 0.2
    """Fraction beta of the tokens that the second phase keeps."""
    switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the updates after which the second phase begins."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"teacher.logprob", "student.logprob", "student.entropy"}
    )

    @property
    def follows_progress(self) -> bool:
        """True: the second phase begins after a fraction of the updates."""
        return True

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, "B T"]:
        """Return the tokens that are kept."""
        mask = jnp.asarray(context.mask)
        bound = math.log(self.floor) / (1 - self.floor)
        good = scores.advantage >= bound
        entropy = scores.student.entropy
        unsure = entropy >= masked_quantile(entropy, mask, 1 - self.entropy_fraction)
        return mask & jnp.where(jnp.asarray(context.progress) < self.switch, good, unsure)


@config
class Tip(StatelessFilter):
    """Select the tokens with high student entropy, or high divergence from the teacher, or both.

    h is the student's entropy, clipped at the batch's 98 % quantile, d the exact KL(pi_S || pi_T),
    each min-max scaled to [0, 1] over the batch; the ceil(rho L_i) tokens of each trajectory with
    the largest s = h + d - h d are kept. Of equal scores the earlier token is kept.

    References: arXiv 2604.14084.
    """

    kind: Literal["tip"] = "tip"
    """Name of this filter."""
    keep_fraction: Share = 0.5
    """Share rho of a trajectory's tokens that are kept."""

    needs: ClassVar[frozenset[str]] = frozenset({"student.entropy", "reverse_kl"})

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, "B T"]:
        """Return the tokens that are kept."""
        if scores.reverse_kl is None:
            raise ValueError("tip needs the exact divergence: method.score.reverse_kl")
        mask, entropy = jnp.asarray(context.mask), scores.student.entropy
        unsure = jnp.minimum(entropy, masked_quantile(entropy, mask, CLIPPED))
        h, d = _to_unit(unsure, mask), _to_unit(scores.reverse_kl, mask)
        # As a product: exactly 1 where h or d is 1, so that rounding does not break such ties.
        return keep_largest(1 - (1 - h) * (1 - d), mask, self.keep_fraction)


@config
class HardTokens(StatelessFilter):
    """Keep the tokens with the largest FiRe-OPD weights and drop the others: its ablation.

    The score is (1 + alpha c^T)(1 + beta c^S), entropies normalised by their maximum over the
    batch; the ceil(rho L_i) tokens of each trajectory with the largest score are kept.

    References: arXiv 2606.02684, the ablation with hard token selection.
    """

    kind: Literal["hard_tokens"] = "hard_tokens"
    """Name of this filter."""
    keep_fraction: Share = 0.5
    """Share rho of a trajectory's tokens that are kept."""
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength of the teacher's confidence."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength of the student's confusion."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.entropy", "student.entropy"})

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, "B T"]:
        """Return the tokens that are kept."""
        mask = jnp.asarray(context.mask)

        def share(entropy: Array) -> Array:
            top = jnp.max(jnp.where(mask & jnp.isfinite(entropy), entropy, 0.0), initial=1e-6)
            return jnp.clip(entropy / top, 0.0, 1.0)

        sure, unsure = 1 - share(scores.teacher_stats.entropy), share(scores.student.entropy)
        score = (1 + self.alpha * sure) * (1 + self.beta * unsure)
        return keep_largest(score, mask, self.keep_fraction)


@config
class LeastLikely(StatelessFilter):
    """Keep the tokens that the student itself finds least likely: OPSA's choice.

    The max(1, floor(rho L_i)) tokens of each trajectory with the lowest log pi_S are kept; of equal
    ones the earlier token.

    References: arXiv 2608.31046. The released code chooses among all responses on one device.
    """

    kind: Literal["least_likely"] = "least_likely"
    """Name of this filter."""
    keep_fraction: Share = 0.2
    """Share rho of a trajectory's tokens that are kept."""

    needs: ClassVar[frozenset[str]] = frozenset({"student.logprob"})

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, "B T"]:
        """Return the tokens that are kept."""
        mask, logprob = jnp.asarray(context.mask), scores.student.logprob
        logprob = jnp.where(jnp.isnan(logprob), jnp.inf, logprob)
        length = jnp.sum(mask, axis=1, keepdims=True)
        count = jnp.maximum(jnp.floor(self.keep_fraction * length + 1e-6), 1).astype(jnp.int32)
        return mask & (ranks(logprob, mask) < count)


def keep_largest(
    score: Float32[Array, "B T"], mask: Bool[Array, "B T"], fraction: float
) -> Bool[Array, "B T"]:
    """Return a mask of each row's ceil(rho L_i) largest scores.

    Of equal scores the earlier token is kept; NaN ranks lowest.
    """
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    length = jnp.sum(mask, axis=1, keepdims=True)
    count = jnp.ceil(fraction * length - 1e-6).astype(jnp.int32)
    return mask & (ranks(-score, mask) < count)


def _to_unit(values: Float32[Array, "B T"], mask: Bool[Array, "B T"]) -> Float32[Array, "B T"]:
    """Scale the finite values where `mask` is true linearly to [0, 1]; 0 where all are equal."""
    inside = mask & jnp.isfinite(values)
    low = jnp.min(jnp.where(inside, values, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(inside, values, -jnp.inf), initial=-jnp.inf)
    span = jnp.where(high > low, high - low, 1.0)
    # The largest is set to exactly 1, however XLA rounds the division.
    share = jnp.where((values >= high) & (high > low), 1.0, (values - low) / span)
    return jnp.where(inside, share, 0.0)
