"""Which trajectories the student learns from.

    scores, mask, teacher -> keep bool[B], or bool[B, T] of a filter that selects tokens

A filter ranks the rows, or tokens, of the global batch: it must see them all at once, never a
micro-batch. Rows without a response token are neither ranked nor kept.
"""

import math
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
        progress: Float32[Array, ""] | float = 0.0,
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
    score: Literal["likelihood", "student_relative"] = "likelihood"
    """s_i of the paper, or the mean of log pi_T - log pi_S: likelihood alone prefers what is easy,
    or repeats itself."""

    @property
    def needs(self) -> frozenset[str]:
        """What the score must give."""
        relative = {"student.logprob"} if self.score == "student_relative" else set()
        return frozenset({"teacher.logprob"} | relative)

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
        progress: Float32[Array, ""] | float = 0.0,
    ) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        valid = jnp.any(mask, axis=1)
        num_groups = num_teachers if self.scope == "teacher" else 1
        group = jnp.asarray(teacher) if self.scope == "teacher" else jnp.zeros_like(teacher)
        # Empty rows form a last group of their own: they take no rank from the others.
        group = jnp.where(valid, group, num_groups)
        each = scores.teacher.logprob
        if self.score == "student_relative":
            each = each - scores.student.logprob
        rank = _rank(trajectory_score(each, mask), group, num_groups + 1)
        size = jnp.sum(group[:, None] == jnp.arange(num_groups + 1)[None, :], axis=0)
        # floor(rho n) for every n, on the host: float32 would round 0.29 * 100 to its taste.
        # The 1e-9 forgives the binary fraction when rho n is a whole number.
        drops = np.floor(self.drop_fraction * np.arange(mask.shape[0] + 1) + 1e-9).astype(np.int32)
        return valid & (rank >= jnp.asarray(drops)[size][group])


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
    entropy_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share beta of the tokens that stay in the second phase."""
    switch: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the updates after which the second phase begins."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"teacher.logprob", "student.logprob", "student.entropy"}
    )

    def __call__(
        self,
        scores: Scores,
        mask: Bool[Array, "B T"],
        teacher: Int32[Array, " B"],
        num_teachers: int,
        progress: Float32[Array, ""] | float = 0.0,
    ) -> Bool[Array, "B T"]:
        """Return the tokens that stay; `progress` is the share of the updates done."""
        mask = jnp.asarray(mask)
        bound = math.log(self.floor) / (1 - self.floor)
        good = scores.teacher.logprob - scores.student.logprob >= bound
        entropy = scores.student.entropy
        unsure = entropy >= masked_quantile(entropy, mask, 1 - self.entropy_fraction)
        return mask & jnp.where(jnp.asarray(progress) < self.switch, good, unsure)


def masked_quantile(
    values: Float32[Array, "B T"], mask: Bool[Array, "B T"], fraction: float
) -> Float32[Array, ""]:
    """Return the quantile of the finite values where `mask` is true, interpolated; inf of none."""
    inside = mask & jnp.isfinite(values)
    ordered = jnp.sort(jnp.where(inside, values, jnp.inf).reshape(-1))
    place = fraction * jnp.maximum(inside.sum() - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.ceil(place).astype(jnp.int32)
    between = place - low
    return jnp.where(
        between > 0, ordered[low] + between * (ordered[high] - ordered[low]), ordered[low]
    )


def trajectory_score(
    logprob: Float32[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float32[Array, " B"]:
    """Return s_i, the mean of `logprob` over each row's tokens; 0 on an empty row."""
    total = jnp.sum(jnp.where(mask, logprob, 0.0), axis=1)
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
