"""Reweightings: the weight of each token in the loss.

    scores, context, keep -> weight f32[B, T]

Weights have mean 1 over each trajectory's tokens (except `progressive`, which is not normalised,
and `soft_trajectories`, whose mean over rows is 1), are 0 where masked, and carry no gradient.
Dropped rows have weights like the others; their coefficient in `batch.py` is 0. Maxima are over
the global batch, never over a micro-batch.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float32
from pydantic import Field

from fireopd_jax.config import Section, config
from fireopd_jax.method.stage import Keep, StatelessReweighting
from fireopd_jax.ops.ranks import masked_quantile
from fireopd_jax.types import Array, Scores, StageContext

Scope = Literal["batch", "kept", "teacher", "row", "vocabulary"]


@config
class Uniform(StatelessReweighting):
    """Weight 1 for every token."""

    kind: Literal["uniform"] = "uniform"
    """Name of this weighting."""

    def weight(self, scores: Scores, context: StageContext, keep: Keep) -> Float32[Array, "B T"]:
        """Return 1 on each response token."""
        return jnp.asarray(context.mask).astype(jnp.float32)


@config
class ConfidenceConfusion(Section, StatelessReweighting):
    """Larger weights where the teacher's entropy is low and the student's is high.

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
    """Tokens that the entropy maxima are taken over: all, those of kept rows, of the rows of the
    same teacher, or of the row itself (the authors' code at its published settings).
    `vocabulary` uses the bound log V in place of both maxima, which no outlier affects."""
    max_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Quantile used as the maximum: below 1 no single outlier determines it, and entropies above
    it are clipped to it."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.entropy", "student.entropy"})

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of the maxima where none is taken: zero strengths, or the bound log V."""
        if self.alpha == self.beta == 0:
            yield "max_scope", "with alpha = beta = 0"
            yield "max_quantile", "with alpha = beta = 0"
        elif self.max_scope == "vocabulary":
            yield "max_quantile", "with max_scope: vocabulary, whose bound is log V"

    @property
    def kernel_strengths(self) -> tuple[float, float] | None:
        """(alpha, beta) where no maximum over the batch is needed, so that the kernel weights."""
        return (self.alpha, self.beta) if self.max_scope == "vocabulary" else None

    def weight(self, scores: Scores, context: StageContext, keep: Keep) -> Float32[Array, "B T"]:
        """Return w~, 0 where masked."""
        mask = jnp.asarray(context.mask)

        def share(entropy: Array) -> Array:
            top = self._top(entropy, context, keep)
            return jnp.clip(entropy / jnp.maximum(top, 1e-6), 0.0, 1.0)

        if scores.token_weight is not None and self.kernel_strengths is not None:
            weight = scores.token_weight
        else:
            confidence = 1.0 - share(scores.teacher_stats.entropy)
            confusion = share(scores.student.entropy)
            weight = (1.0 + self.alpha * confidence) * (1.0 + self.beta * confusion)
        weight = jnp.where(mask, weight, 0.0)
        length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        mean = jnp.sum(weight, axis=1, keepdims=True) / length
        return jax.lax.stop_gradient(weight / jnp.where(mean == 0.0, 1.0, mean))

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> Mapping[str, Float32[Array, " B"]]:
        """Return the maxima that both entropies of a row are divided by."""
        rows = (context.mask.shape[0],)

        def top(entropy: Array) -> Array:
            return jnp.broadcast_to(self._top(entropy, context, keep)[:, 0], rows)

        teacher, student = scores.teacher_stats.entropy, scores.student.entropy
        return {"teacher_entropy_top": top(teacher), "student_entropy_top": top(student)}

    def _top(
        self, entropy: Array, context: StageContext, keep: Keep
    ) -> Float32[Array, "B 1"] | Float32[Array, "1 1"]:
        """Return the maximum, or `max_quantile`, of the finite entropies of the tokens in scope.

        Non-finite values are excluded, so that a broken row does not change the others' weights.
        """
        if self.max_scope == "vocabulary":
            return jnp.full((1, 1), math.log(_known(context.vocab_size)), jnp.float32)
        inside = jnp.asarray(context.mask) & jnp.isfinite(entropy)
        if self.max_scope == "kept":
            inside = inside & (keep if keep.ndim == 2 else keep[:, None])
        if self.max_scope == "row":
            return jax.vmap(self._largest)(entropy, inside)[:, None]
        if self.max_scope == "teacher":
            route = jnp.asarray(context.teacher)
            own = jnp.arange(context.num_teachers)[:, None, None] == route[None, :, None]
            each = jax.vmap(lambda mine: self._largest(entropy, inside & mine))(own)
            return each[route][:, None]
        return self._largest(entropy, inside)[None, None]

    def _largest(self, entropy: Array, inside: Array) -> Float32[Array, ""]:
        """Return the `max_quantile` of the values where `inside` is true; 0 where none is."""
        if self.max_quantile == 1:
            return jnp.max(jnp.where(inside, entropy, 0.0), initial=0.0)
        quantile = masked_quantile(entropy, inside, self.max_quantile)
        return jnp.where(inside.any(), quantile, 0.0)


@config
class Progressive(StatelessReweighting):
    """Larger weights for the tokens before most of the disagreement |A| has accumulated.

    w_t = 1 + gamma (1 - sum_{u < t} |A_u| / sum_u |A_u|), A = log pi_T - log pi_S: from 1 + gamma
    at the first token down to 1. Not normalised, as in the paper.

    References: arXiv 2606.22600 (IW-OPD).
    """

    kind: Literal["progressive"] = "progressive"
    """Name of this weighting."""
    gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Extra weight of the first token."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    def weight(self, scores: Scores, context: StageContext, keep: Keep) -> Float32[Array, "B T"]:
        """Return w, 0 where masked."""
        mask = jnp.asarray(context.mask)
        gap = jnp.where(mask, jnp.abs(scores.advantage), 0.0)
        before = jnp.cumsum(gap, axis=1) - gap
        total = gap.sum(axis=1, keepdims=True)
        met = before / jnp.where(total > 0, total, 1.0)
        return jax.lax.stop_gradient(jnp.where(mask, 1.0 + self.gamma * (1.0 - met), 0.0))


@config
class SoftTrajectories(StatelessReweighting):
    """Weight trajectories by their teacher likelihood instead of dropping some: an ablation.

    u_i = n exp(s_i / tau) / sum_j exp(s_j / tau) over the n rows of the batch, s_i the mean of
    log pi_T; the weight of a token of row i is u_i times its weight from `tokens`.

    References: arXiv 2606.02684, the ablation with soft trajectory weights; the formula is our own.
    """

    kind: Literal["soft_trajectories"] = "soft_trajectories"
    """Name of this weighting."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """tau, in nats; a large value makes all rows' weights equal."""
    tokens: Annotated[Uniform | ConfidenceConfusion | Progressive, Field(discriminator="kind")] = (
        Uniform()
    )
    """Reweighting of the tokens within a trajectory."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the scores that the reweighting uses."""
        return self.tokens.needs | {"teacher.logprob"}

    def weight(self, scores: Scores, context: StageContext, keep: Keep) -> Float32[Array, "B T"]:
        """Return u_i times the token's weight within its trajectory, 0 where masked."""
        mask = jnp.asarray(context.mask)
        valid, length = mask.any(axis=1), mask.sum(axis=1)
        score = jnp.where(mask, scores.teacher_stats.logprob, 0.0).sum(axis=1) / jnp.maximum(
            length, 1
        )
        usable = valid & jnp.isfinite(score)
        share = jax.nn.softmax(score / self.temperature, where=usable)
        share = jnp.where(usable, share * jnp.sum(valid), 0.0)
        return jax.lax.stop_gradient(share[:, None] * self.tokens.weight(scores, context, keep))

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> Mapping[str, Float32[Array, " B"]]:
        """Return those of the reweighting of tokens."""
        return self.tokens.measured(scores, context, keep)


def _known(vocab_size: int | None) -> int:
    if vocab_size is None:
        raise ValueError("max_scope 'vocabulary' needs vocab_size, the size of the vocabulary V")
    return vocab_size
