"""Which trajectories the student learns from.

    scores, mask, teacher -> keep bool[B]

A filter ranks the rows of the global batch: it must see them all at once, never a micro-batch. Rows
without a response token are neither ranked nor kept.
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.types import Array, Scores


@config
class KeepAll:
    """Keep every trajectory."""

    kind: Literal["keep_all"] = "keep_all"
    """Name of this filter."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
    ) -> Bool[Array, " B"]:
        """Return the rows that hold a token."""
        return jnp.any(mask, axis=1)


@config
class TeacherQuantile:
    """Drop the fraction rho of trajectories that the teacher finds least likely.

    s_i = (1/L_i) sum_t log pi_T(y_it); of n rows the floor(rho n) lowest go. Among equals the lower
    row index goes first. A row whose score is NaN ranks lowest.

    References: arXiv 2606.02684, Eq. 4.
    """

    kind: Literal["teacher_quantile"] = "teacher_quantile"
    """Name of this filter."""
    drop_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share rho of the rows to drop."""
    scope: Literal["batch", "teacher"] = "batch"
    """Rank over the whole batch, or among the rows of the same teacher."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob"})

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
    ) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        valid = jnp.any(mask, axis=1)
        num_groups = num_teachers if self.scope == "teacher" else 1
        group = jnp.asarray(teacher) if self.scope == "teacher" else jnp.zeros_like(teacher)
        # Empty rows form a last group of their own: they take no rank from the others.
        group = jnp.where(valid, group, num_groups)
        rank = _rank(trajectory_score(scores.teacher.logprob, mask), group, num_groups + 1)
        size = jnp.sum(group[:, None] == jnp.arange(num_groups + 1)[None, :], axis=0)
        # floor(rho n) for every n, on the host: float32 would round 0.29 * 100 to its taste.
        # The 1e-9 forgives the binary fraction when rho n is a whole number.
        drops = np.floor(self.drop_fraction * np.arange(mask.shape[0] + 1) + 1e-9).astype(np.int32)
        return valid & (rank >= jnp.asarray(drops)[size][group])


def trajectory_score(
    teacher_logprob: Float32[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float32[Array, " B"]:
    """Return s_i, the mean of `teacher_logprob` over each row's tokens; 0 on an empty row."""
    total = jnp.sum(jnp.where(mask, teacher_logprob, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _rank(
    score: Float32[Array, " B"], group: Int32[Array, " B"], num_groups: int
) -> Int32[Array, " B"]:
    """Return each row's place within its group, the lowest score first, stable."""
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    order = jnp.lexsort((score, group))
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    size = jnp.sum(group[:, None] == jnp.arange(num_groups)[None, :], axis=0)
    return (place - (jnp.cumsum(size) - size)[group]).astype(jnp.int32)
