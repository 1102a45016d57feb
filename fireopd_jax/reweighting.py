"""How much each token of a trajectory counts.

    scores, mask, keep, teacher -> weight f32[B, T]

Weights have mean 1 over their own trajectory's tokens (but `progressive`, whose rise is its point),
are 0 where masked, and carry no gradient.
Dropped rows are weighted like the others; `batch.py` leaves them out. Maxima are over the global
batch: they must see it at once, never a micro-batch.
"""

import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.types import Array, Scores

Scope = Literal["batch", "kept", "teacher", "row", "vocabulary"]


@config
class Uniform:
    """Weigh every token 1."""

    kind: Literal["uniform"] = "uniform"
    """Name of this weighting."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        keep: Bool[Array, " B"] | Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
        vocab_size: int | None = None,
    ) -> Float32[Array, "B T"]:
        """Return 1 on each response token."""
        return jnp.asarray(mask).astype(jnp.float32)


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

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.entropy", "student.entropy"})

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        keep: Bool[Array, " B"] | Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
        vocab_size: int | None = None,
    ) -> Float32[Array, "B T"]:
        """Return w~, 0 where masked."""

        def share(entropy: Array) -> Array:
            if self.max_scope == "vocabulary":
                top = jnp.full((1, 1), math.log(_known(vocab_size)), jnp.float32)
            else:
                top = self._maximum(entropy, mask, keep, teacher, num_teachers)
            return jnp.clip(entropy / jnp.maximum(top, 1e-6), 0.0, 1.0)

        confidence = 1.0 - share(scores.teacher.entropy)
        confusion = share(scores.student.entropy)
        weight = (1.0 + self.alpha * confidence) * (1.0 + self.beta * confusion)
        weight = jnp.where(mask, weight, 0.0)
        length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        mean = jnp.sum(weight, axis=1, keepdims=True) / length
        return jax.lax.stop_gradient(weight / jnp.where(mean == 0.0, 1.0, mean))

    def _maximum(
        self, entropy: Array, mask: Array, keep: Array, teacher: Array, num_teachers: int
    ) -> Float32[Array, "B 1"] | Float32[Array, "1 1"]:
        """Return the largest finite entropy of the tokens in scope.

        A row that went wrong must not reach the others through the maximum.
        """
        inside = mask & jnp.isfinite(entropy)
        if self.max_scope == "kept":
            inside = inside & (keep if keep.ndim == 2 else keep[:, None])
        entropy = jnp.where(inside, entropy, 0.0)
        row = jnp.max(entropy, axis=1, initial=0.0)
        if self.max_scope == "row":
            return row[:, None]
        if self.max_scope == "teacher":
            own = jnp.asarray(teacher)[:, None] == jnp.arange(num_teachers)[None, :]
            by_teacher = jnp.max(jnp.where(own, row[:, None], 0.0), axis=0, initial=0.0)
            return by_teacher[jnp.asarray(teacher)][:, None]
        return jnp.max(row, initial=0.0)[None, None]


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

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        keep: Bool[Array, " B"] | Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
        vocab_size: int | None = None,
    ) -> Float32[Array, "B T"]:
        """Return w, 0 where masked."""
        gap = jnp.where(mask, jnp.abs(scores.teacher.logprob - scores.student.logprob), 0.0)
        before = jnp.cumsum(gap, axis=1) - gap
        total = gap.sum(axis=1, keepdims=True)
        met = before / jnp.where(total > 0, total, 1.0)
        return jax.lax.stop_gradient(jnp.where(mask, 1.0 + self.gamma * (1.0 - met), 0.0))


def _known(vocab_size: int | None) -> int:
    if vocab_size is None:
        raise ValueError("max_scope 'vocabulary' needs vocab_size, the size of the vocabulary")
    return vocab_size
