"""How much each token of a trajectory counts.

    scores, rows, keep -> weight f32[B, T]

Weights have mean 1 over their own trajectory's tokens (but `progressive`, whose rise is its point,
and `soft_trajectories`, whose mean over rows is 1), are 0 where masked, and carry no gradient.
Dropped rows are weighted like the others; `batch.py` leaves them out. Maxima are over the global
batch: they must see it at once, never a micro-batch.
"""

import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.ops.ranks import masked_quantile
from fireopd_jax.types import Array, Rows, Scores

Keep = Bool[Array, " B"] | Bool[Array, "B T"]
Scope = Literal["batch", "kept", "teacher", "row", "vocabulary"]


@config
class Uniform:
    """Weigh every token 1."""

    kind: Literal["uniform"] = "uniform"
    """Name of this weighting."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: Scores, rows: Rows, keep: Keep) -> Float32[Array, "B T"]:
        """Return 1 on each response token."""
        return jnp.asarray(rows.mask).astype(jnp.float32)


@config
class ConfidenceConfusion:
    """Favour tokens where the teacher is sure and the student is not.

    c^T = 1 - H^T / max H^T, c^S = H^S / max H^S, w = (1 + alpha c^T)(1 + beta c^S), and
    w~ = w / (the mean of w over the trajectory).

    References: arXiv 2606.02684, Eq. 5-8.
    """

    kind: Literal["confidence_confusion"] = "confidence_confusion"
    """Name of this weighting."""
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength of the teacher's confidence c^T; 0 ignores it."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength of the student's confusion c^S; 0 ignores it."""
    max_scope: Scope = "batch"
    """Tokens the entropy maxima are taken over: all, those of kept rows, of the rows of the same
    teacher, or of the row itself: what the authors' code does at the settings it ships. Or none:
    with `vocabulary` the bound log V stands in place of both maxima, and no outlier sets them."""
    max_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Quantile that stands for the maximum: below 1 no single outlier sets it. What lies above
    counts as 1."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.entropy", "student.entropy"})

    def __call__(self, scores: Scores, rows: Rows, keep: Keep) -> Float32[Array, "B T"]:
        """Return w~, 0 where masked."""
        mask = jnp.asarray(rows.mask)

        def share(entropy: Array) -> Array:
            top = self._top(entropy, rows, keep)
            return jnp.clip(entropy / jnp.maximum(top, 1e-6), 0.0, 1.0)

        confidence = 1.0 - share(scores.teacher.entropy)
        confusion = share(scores.student.entropy)
        weight = (1.0 + self.alpha * confidence) * (1.0 + self.beta * confusion)
        weight = jnp.where(mask, weight, 0.0)
        length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        mean = jnp.sum(weight, axis=1, keepdims=True) / length
        return jax.lax.stop_gradient(weight / jnp.where(mean == 0.0, 1.0, mean))

    def _top(
        self, entropy: Array, rows: Rows, keep: Keep
    ) -> Float32[Array, "B 1"] | Float32[Array, "1 1"]:
        """Return the largest finite entropy of the tokens in scope, or the quantile near it.

        A row that went wrong must not reach the others through the maximum.
        """
        if self.max_scope == "vocabulary":
            return jnp.full((1, 1), math.log(_known(rows.vocab_size)), jnp.float32)
        inside = jnp.asarray(rows.mask) & jnp.isfinite(entropy)
        if self.max_scope == "kept":
            inside = inside & (keep if keep.ndim == 2 else keep[:, None])
        if self.max_scope == "row":
            return jax.vmap(self._largest)(entropy, inside)[:, None]
        if self.max_scope == "teacher":
            route = jnp.asarray(rows.teacher)
            own = jnp.arange(rows.num_teachers)[:, None, None] == route[None, :, None]
            each = jax.vmap(lambda mine: self._largest(entropy, inside & mine))(own)
            return each[route][:, None]
        return self._largest(entropy, inside)[None, None]

    def _largest(self, entropy: Array, inside: Array) -> Float32[Array, ""]:
        """Return the quantile of the values `inside`, by default their maximum; 0 of none."""
        if self.max_quantile == 1:
            return jnp.max(jnp.where(inside, entropy, 0.0), initial=0.0)
        quantile = masked_quantile(entropy, inside, self.max_quantile)
        return jnp.where(inside.any(), quantile, 0.0)


@config
class Progressive:
    """Favour the tokens before most of the disagreement has been met.

    w_t = 1 + gamma (1 - sum_{u < t} |A_u| / sum_u |A_u|), A = log pi_T - log pi_S: from 1 + gamma
    at the first token down towards 1. Not normalised, as in the paper.

    References: arXiv 2606.22600 (IW-OPD).
    """

    kind: Literal["progressive"] = "progressive"
    """Name of this weighting."""
    gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Extra weight of the first token."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    def __call__(self, scores: Scores, rows: Rows, keep: Keep) -> Float32[Array, "B T"]:
        """Return w, 0 where masked."""
        mask = jnp.asarray(rows.mask)
        gap = jnp.where(mask, jnp.abs(scores.teacher.logprob - scores.student.logprob), 0.0)
        before = jnp.cumsum(gap, axis=1) - gap
        total = gap.sum(axis=1, keepdims=True)
        met = before / jnp.where(total > 0, total, 1.0)
        return jax.lax.stop_gradient(jnp.where(mask, 1.0 + self.gamma * (1.0 - met), 0.0))


@config
class SoftTrajectories:
    """Weigh trajectories by their likelihood instead of dropping the least likely: an ablation.

    u_i = n exp(s_i / tau) / sum_j exp(s_j / tau) over the n rows of the batch, s_i the mean of
    log pi_T; every token of row i has u_i times the weight that `tokens` gives it.

    References: arXiv 2606.02684, the ablation with soft trajectory weights, whose formula the notes
    do not give.
    """

    kind: Literal["soft_trajectories"] = "soft_trajectories"
    """Name of this weighting."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """tau, in nats: a large one makes all rows alike."""
    tokens: Annotated[Uniform | ConfidenceConfusion | Progressive, Field(discriminator="kind")] = (
        Uniform()
    )
    """How tokens are weighed within a trajectory."""

    @property
    def needs(self) -> frozenset[str]:
        """What the score must give."""
        return self.tokens.needs | {"teacher.logprob"}

    def __call__(self, scores: Scores, rows: Rows, keep: Keep) -> Float32[Array, "B T"]:
        """Return the product, 0 where masked."""
        mask = jnp.asarray(rows.mask)
        valid, length = mask.any(axis=1), mask.sum(axis=1)
        score = jnp.where(mask, scores.teacher.logprob, 0.0).sum(axis=1) / jnp.maximum(length, 1)
        usable = valid & jnp.isfinite(score)
        share = jax.nn.softmax(score / self.temperature, where=usable)
        share = jnp.where(usable, share * jnp.sum(valid), 0.0)
        return jax.lax.stop_gradient(share[:, None] * self.tokens(scores, rows, keep))


def _known(vocab_size: int | None) -> int:
    if vocab_size is None:
        raise ValueError("max_scope 'vocabulary' needs vocab_size, the size of the vocabulary")
    return vocab_size
