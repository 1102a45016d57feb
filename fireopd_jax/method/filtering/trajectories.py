"""Which trajectories the student learns from, by their rank in the batch.

    scores, rows -> keep bool[B]

A filter ranks the rows of the global batch: it must see them all at once, never a micro-batch. Rows
without a response token are neither ranked nor kept.
"""

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32
from pydantic import Field, NonNegativeInt

from fireopd_jax.config import config
from fireopd_jax.types import Array, Rows, Scores

Fraction = Annotated[float, Field(ge=0, le=1)]


@config
class KeepAll:
    """Keep every trajectory."""

    kind: Literal["keep_all"] = "keep_all"
    """Name of this filter."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, " B"]:
        """Return the rows that hold a token."""
        return jnp.any(rows.mask, axis=1)


@config
class TeacherQuantile:
    """Drop the fraction rho of trajectories that the teacher finds least likely.

    s_i = (1/L_i) sum_t log pi_T(y_it); of n rows the floor(rho n) lowest go. Among equals the lower
    row index goes first. A row whose score is NaN ranks lowest.

    References: arXiv 2606.02684, Eq. 4.
    """

    kind: Literal["teacher_quantile"] = "teacher_quantile"
    """Name of this filter."""
    drop_fraction: Fraction = 0.2
    """Share rho of the rows to drop."""
    scope: Literal["batch", "teacher"] = "batch"
    """Rank over the whole batch, or among the rows of the same teacher."""
    score: Literal["likelihood", "student_relative"] = "likelihood"
    """s_i of the paper, or the mean of log pi_T - log pi_S: likelihood alone prefers what is easy,
    or repeats itself."""
    window: NonNegativeInt = 0
    """Earlier batches whose rows are ranked, too: for batches of few rows."""

    @property
    def needs(self) -> frozenset[str]:
        """What the score must give."""
        relative = {"student.logprob"} if self.score == "student_relative" else set()
        return frozenset({"teacher.logprob"} | relative)

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        score, valid = self.scores(scores, rows), jnp.any(rows.mask, axis=1)
        own = self.scope == "teacher"
        groups = rows.num_teachers if own else 1
        group = jnp.asarray(rows.teacher) if own else jnp.zeros_like(rows.teacher)
        # Empty rows form a last group of their own: they take no rank from the others.
        group = jnp.where(valid, group, groups)
        if not self.window:
            return valid & stays(score, group, groups, self.drop_fraction)
        if rows.recent is None:
            raise ValueError("a filter with a window needs the scores of earlier batches")
        # Earlier rows stand before those of now: among equals they go first.
        before, route = rows.recent.reshape(-1, 2).T
        earlier = (
            jnp.nan_to_num(route).astype(group.dtype)
            if own
            else jnp.zeros(route.shape, group.dtype)
        )
        earlier = jnp.where(jnp.isnan(before), groups, earlier)
        score, group = jnp.concatenate([before, score]), jnp.concatenate([earlier, group])
        return valid & stays(score, group, groups, self.drop_fraction)[len(before) :]

    def scores(self, scores: Scores, rows: Rows) -> Float32[Array, " B"]:
        """Return s_i."""
        each = scores.teacher.logprob
        if self.score == "student_relative":
            each = each - scores.student.logprob
        return trajectory_score(each, rows.mask)

    def remember(
        self, scores: Scores, rows: Rows, recent: Float32[Array, "W B 2"]
    ) -> Float32[Array, "W B 2"]:
        """Put this batch's scores and teachers in the place of the oldest; NaN: no row."""
        valid = jnp.any(rows.mask, axis=1)
        # A row whose score is NaN ranks lowest, then and later.
        score = jnp.nan_to_num(self.scores(scores, rows), nan=-jnp.inf)
        new = jnp.stack(
            [jnp.where(valid, score, jnp.nan), rows.teacher.astype(jnp.float32)], axis=1
        )
        return jnp.concatenate([recent[1:], new[None]])


@config
class RandomDrop:
    """Drop a fraction of the trajectories by lot: a control for filters that look at them."""

    kind: Literal["random_drop"] = "random_drop"
    """Name of this filter."""
    drop_fraction: Fraction = 0.2
    """Share of the rows to drop."""
    seed: NonNegativeInt = 0
    """Seed of the lots, which are functions of it and of a row's sample id."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        if rows.sample_id is None:
            raise ValueError("a random drop needs the rows' sample ids")
        key = jax.random.key(self.seed, impl="threefry2x32")
        lot = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(rows.sample_id)
        return drop_lowest(lot, rows.mask, self.drop_fraction)


@config
class LengthDrop:
    """Drop the shortest or the longest trajectories: a control, since likelihood follows length."""

    kind: Literal["length_drop"] = "length_drop"
    """Name of this filter."""
    drop_fraction: Fraction = 0.2
    """Share of the rows to drop."""
    drop: Literal["shortest", "longest"] = "longest"
    """Which go."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        length = jnp.sum(rows.mask, axis=1).astype(jnp.float32)
        order = length if self.drop == "shortest" else -length
        return drop_lowest(order, rows.mask, self.drop_fraction)


def drop_lowest(
    score: Float32[Array, " B"], mask: Bool[Array, "B T"], fraction: float
) -> Bool[Array, " B"]:
    """Keep all rows but the fraction with the lowest scores; empty rows are neither."""
    valid = jnp.any(mask, axis=1)
    return valid & stays(score, jnp.where(valid, 0, 1), 1, fraction)


def stays(
    score: Float32[Array, " N"], group: Int32[Array, " N"], groups: int, fraction: float
) -> Bool[Array, " N"]:
    """Tell which rows are not among the floor(rho n) lowest of their group of n.

    The group `groups` is that of rows which take no rank from the others.
    """
    rank = _rank(score, group, groups + 1)
    size = jnp.sum(group[:, None] == jnp.arange(groups + 1)[None, :], axis=0)
    # floor(rho n) for every n, on the host: float32 would round 0.29 * 100 to its taste.
    # The 1e-9 forgives the binary fraction when rho n is a whole number.
    drops = np.floor(fraction * np.arange(score.shape[0] + 1) + 1e-9).astype(np.int32)
    return rank >= jnp.asarray(drops)[size][group]


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
