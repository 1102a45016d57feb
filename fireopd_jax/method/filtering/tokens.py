"""Which tokens the student learns from, by what both models think of them.

scores, rows -> keep bool[B, T]
"""

import math
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.ops.ranks import masked_quantile, ranks
from fireopd_jax.types import Array, Rows, Scores

Share = Annotated[float, Field(gt=0, le=1)]
CLIPPED = 0.98
"""Quantile of the batch at which TIP cuts the student's entropy off."""


@config
class Reopold:
    """Select tokens in two phases: first those not too bad, then those the student is unsure of.

    Of R = log pi_T - log pi_S the tokens with R >= (ln lambda) / (1 - lambda) stay in the first
    phase; in the second those whose student entropy is no lower than the (1 - beta)-quantile of all
    response tokens of the batch, interpolated between two.

    References: arXiv 2603.11137.
    """

    kind: Literal["reopold"] = "reopold"
    """Name of this filter."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """lambda of the first phase: .1 is an advantage of -2.56."""
    entropy_fraction: Share = 0.2
    """Share beta of the tokens that stay in the second phase."""
    switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the updates after which the second phase begins."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"teacher.logprob", "student.logprob", "student.entropy"}
    )

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        mask = jnp.asarray(rows.mask)
        bound = math.log(self.floor) / (1 - self.floor)
        good = scores.teacher.logprob - scores.student.logprob >= bound
        entropy = scores.student.entropy
        unsure = entropy >= masked_quantile(entropy, mask, 1 - self.entropy_fraction)
        return mask & jnp.where(jnp.asarray(rows.progress) < self.switch, good, unsure)


@config
class Tip:
    """Select the tokens where the student is unsure, or far from the teacher, or both.

    h is the student's entropy, cut off at the batch's 98 % quantile, d the exact KL(pi_S || pi_T),
    each brought to [0, 1] over the batch's tokens; of s = h + d - h d the ceil(rho L_i) largest of
    every trajectory stay. Among equals the earlier token does.

    References: arXiv 2604.14084.
    """

    kind: Literal["tip"] = "tip"
    """Name of this filter."""
    keep_fraction: Share = 0.5
    """Share rho of a trajectory's tokens that stay."""

    needs: ClassVar[frozenset[str]] = frozenset({"student.entropy", "reverse_kl"})

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        if scores.reverse_kl is None:
            raise ValueError("tip needs the exact divergence: method.score.reverse_kl")
        mask, entropy = jnp.asarray(rows.mask), scores.student.entropy
        unsure = jnp.minimum(entropy, masked_quantile(entropy, mask, CLIPPED))
        h, d = _to_unit(unsure, mask), _to_unit(scores.reverse_kl, mask)
        # As a product: exactly 1 where h or d is, so that no rounding decides between equals.
        return keep_largest(1 - (1 - h) * (1 - d), mask, self.keep_fraction)


@config
class HardTokens:
    """Keep the tokens that FiRe-OPD's weights favour most, and drop the others: its ablation.

    The score is (1 + alpha c^T)(1 + beta c^S), entropies over their largest of the batch; of every
    trajectory the ceil(rho L_i) largest stay.

    References: arXiv 2606.02684, the ablation with hard token selection.
    """

    kind: Literal["hard_tokens"] = "hard_tokens"
    """Name of this filter."""
    keep_fraction: Share = 0.5
    """Share rho of a trajectory's tokens that stay."""
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength of the teacher's confidence."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength of the student's confusion."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.entropy", "student.entropy"})

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        mask = jnp.asarray(rows.mask)

        def share(entropy: Array) -> Array:
            top = jnp.max(jnp.where(mask & jnp.isfinite(entropy), entropy, 0.0), initial=1e-6)
            return jnp.clip(entropy / top, 0.0, 1.0)

        sure, unsure = 1 - share(scores.teacher.entropy), share(scores.student.entropy)
        score = (1 + self.alpha * sure) * (1 + self.beta * unsure)
        return keep_largest(score, mask, self.keep_fraction)


def keep_largest(
    score: Float32[Array, "B T"], mask: Bool[Array, "B T"], fraction: float
) -> Bool[Array, "B T"]:
    """Keep each row's ceil(rho L_i) largest scores; among equals the earlier; NaN is the least."""
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    length = jnp.sum(mask, axis=1, keepdims=True)
    count = jnp.ceil(fraction * length - 1e-6).astype(jnp.int32)
    return mask & (ranks(-score, mask) < count)


def _to_unit(values: Float32[Array, "B T"], mask: Bool[Array, "B T"]) -> Float32[Array, "B T"]:
    """Bring the finite values where `mask` is true to [0, 1], linearly; 0 where all are equal."""
    inside = mask & jnp.isfinite(values)
    low = jnp.min(jnp.where(inside, values, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(inside, values, -jnp.inf), initial=-jnp.inf)
    span = jnp.where(high > low, high - low, 1.0)
    # The largest is exactly 1, whatever XLA makes of the division.
    share = jnp.where((values >= high) & (high > low), 1.0, (values - low) / span)
    return jnp.where(inside, share, 0.0)
