"""Filters of whole trajectories, by their rank in the batch.

    scores, context, state -> keep bool[B], state

A filter ranks the rows of the global batch, never those of a micro-batch. Rows without a response
token are neither ranked nor kept.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32
from pydantic import Field, NonNegativeInt

from fireopd_jax.config import config
from fireopd_jax.method.stage import Filter, Keep, StageState, StatelessFilter
from fireopd_jax.types import Array, Scores, StageContext

Fraction = Annotated[float, Field(ge=0, le=1)]


@config
class KeepAll(StatelessFilter):
    """Keep every trajectory."""

    kind: Literal["keep_all"] = "keep_all"
    """Name of this filter."""

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, " B"]:
        """Return the rows with at least one response token."""
        return jnp.any(context.mask, axis=1)


@config
class TeacherQuantile(Filter):
    """Drop the fraction rho of trajectories with the lowest mean teacher log-probability.

    s_i = (1/L_i) sum_t log pi_T(y_it); of n rows the floor(rho n) lowest are dropped. Of equal
    scores the lower row index is dropped first. A row whose score is NaN ranks lowest.

    References: arXiv 2606.02684, Eq. 4.
    """

    kind: Literal["teacher_quantile"] = "teacher_quantile"
    """Name of this filter."""
    drop_fraction: Fraction = 0.2
    """Fraction rho of the rows to drop."""
    scope: Literal["batch", "teacher"] = "batch"
    """Rank over the whole batch, or among the rows of the same teacher."""
    score: Literal["likelihood", "student_relative"] = "likelihood"
    """s_i of the paper, or the mean of log pi_T - log pi_S: likelihood alone favours easy and
    repetitive responses."""
    window: NonNegativeInt = 0
    """Number of earlier batches whose rows are ranked with this one; for small batches."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the scores that the filter uses."""
        relative = {"student.logprob"} if self.score == "student_relative" else set()
        return frozenset({"teacher.logprob"} | relative)

    def problems(self, batch_size: int) -> Iterator[str]:
        """Yield a problem where the fraction drops every row, or none although it is above 0."""
        rho, ranked = self.drop_fraction, batch_size * (1 + self.window)
        if self.scope == "teacher":  # the number of rows of each teacher is known only in the batch
            return
        if rho == 1:
            yield "drop_fraction=1: every trajectory is dropped; expected a value below 1"
        elif rho > 0 and int(rho * ranked + 1e-9) == 0:
            yield (
                f"drop_fraction={rho} of {ranked} rows drops none: expected 0, or at least "
                f"{1 / ranked:.3g}, or a larger rollout.batch_size"
            )

    def init(self, batch_size: int) -> StageState:
        """Return f32[W, B, 2]: score and route of the rows of W earlier batches; NaN where empty.

        () without a window.
        """
        return jnp.full((self.window, batch_size, 2), jnp.nan, jnp.float32) if self.window else ()

    def __call__(
        self, scores: Scores, context: StageContext, state: StageState = ()
    ) -> tuple[Bool[Array, " B"], StageState]:
        """Return the rows that are kept, and the window with this batch appended."""
        score, valid = self.scores(scores, context), jnp.any(context.mask, axis=1)
        own = self.scope == "teacher"
        groups = context.num_teachers if own else 1
        group = jnp.asarray(context.teacher) if own else jnp.zeros_like(context.teacher)
        # Empty rows form an extra last group, so that they do not count in any other row's rank.
        group = jnp.where(valid, group, groups)
        if not self.window:
            return valid & stays(score, group, groups, self.drop_fraction), state
        # Rows of earlier batches come first: of equal scores they are dropped first.
        before, route = state.reshape(-1, 2).T
        earlier = (
            jnp.nan_to_num(route).astype(group.dtype)
            if own
            else jnp.zeros(route.shape, group.dtype)
        )
        earlier = jnp.where(jnp.isnan(before), groups, earlier)
        ranked, group = jnp.concatenate([before, score]), jnp.concatenate([earlier, group])
        keep = valid & stays(ranked, group, groups, self.drop_fraction)[len(before) :]
        # A row whose score is NaN ranks lowest, now and in later batches.
        score = jnp.where(valid, jnp.nan_to_num(score, nan=-jnp.inf), jnp.nan)
        new = jnp.stack([score, context.teacher.astype(jnp.float32)], axis=1)
        return keep, jnp.concatenate([state[1:], new[None]])

    def scores(self, scores: Scores, context: StageContext) -> Float32[Array, " B"]:
        """Return the score s_i of each row; 0 for an empty row."""
        relative = self.score == "student_relative"
        each = scores.advantage if relative else scores.teacher_stats.logprob
        return trajectory_score(each, context.mask)

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        """Return s_i, and the lowest one that is kept among the rows that a row is ranked with."""
        score, route = self.scores(scores, context), np.asarray(context.teacher)
        group = route if self.scope == "teacher" else np.zeros_like(route)
        return score, lowest_kept(np.asarray(score), np.asarray(keep), group)


@config
class RandomDrop(StatelessFilter):
    """Drop a random fraction of the trajectories: a control for filters that use the scores."""

    kind: Literal["random_drop"] = "random_drop"
    """Name of this filter."""
    drop_fraction: Fraction = 0.2
    """Fraction of the rows to drop."""
    seed: NonNegativeInt = 0
    """Seed; the dropped rows are a function of it and the rows' sample ids."""

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, " B"]:
        """Return the rows that are kept."""
        return drop_lowest(self.draws(context), context.mask, self.drop_fraction)

    def draws(self, context: StageContext) -> Float32[Array, " B"]:
        """Return a uniform random number for each row."""
        if context.sample_id is None:
            raise ValueError("random_drop needs the sample ids: StageContext.sample_id")
        key = jax.random.key(self.seed, impl="threefry2x32")
        return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(context.sample_id)

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        """Return the random numbers, and the lowest one that is kept."""
        draw, keep = np.asarray(self.draws(context)), np.asarray(keep)
        return draw, lowest_kept(draw, keep, np.zeros(len(draw), np.int32))


@config
class LengthDrop(StatelessFilter):
    """Drop the shortest or longest trajectories: a control, as likelihood correlates with length.

    Of equal lengths the lower row index is dropped first.
    """

    kind: Literal["length_drop"] = "length_drop"
    """Name of this filter."""
    drop_fraction: Fraction = 0.2
    """Fraction of the rows to drop."""
    drop: Literal["shortest", "longest"] = "longest"
    """Which trajectories are dropped."""

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, " B"]:
        """Return the rows that are kept."""
        length = jnp.sum(context.mask, axis=1).astype(jnp.float32)
        order = length if self.drop == "shortest" else -length
        return drop_lowest(order, context.mask, self.drop_fraction)

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        """Return the lengths, and the shortest (longest) one that is kept."""
        length = np.asarray(context.mask).sum(axis=1).astype(np.float32)
        sign = np.float32(1 if self.drop == "shortest" else -1)
        group = np.zeros(len(length), np.int32)
        return length, sign * lowest_kept(sign * length, np.asarray(keep), group)


def drop_lowest(
    score: Float32[Array, " B"], mask: Bool[Array, "B T"], fraction: float
) -> Bool[Array, " B"]:
    """Return the rows that are not among the `fraction` with the lowest scores.

    Empty rows are neither ranked nor kept.
    """
    valid = jnp.any(mask, axis=1)
    return valid & stays(score, jnp.where(valid, 0, 1), 1, fraction)


def stays(
    score: Float32[Array, " N"], group: Int32[Array, " N"], groups: int, fraction: float
) -> Bool[Array, " N"]:
    """Return which rows are not among the floor(rho n) lowest of their group of n.

    Groups are numbered 0 to `groups`, the last of them for rows to be ignored.
    """
    rank = _rank(score, group, groups + 1)
    size = jnp.sum(group[:, None] == jnp.arange(groups + 1)[None, :], axis=0)
    # floor(rho n) for every n, on the host: float32 might round 0.29 * 100 down.
    # The 1e-9 absorbs the rounding of the binary fraction where rho n is a whole number.
    drops = np.floor(fraction * np.arange(score.shape[0] + 1) + 1e-9).astype(np.int32)
    return rank >= jnp.asarray(drops)[size][group]


def lowest_kept(
    score: Float32[np.ndarray, " B"], keep: Keep, group: Int32[np.ndarray, " B"]
) -> Float32[np.ndarray, " B"]:
    """Return, for each row, the lowest score that is kept in its group; NaN where none is."""
    kept = np.asarray(keep) if keep.ndim == 1 else np.asarray(keep).any(axis=1)
    lowest = np.full(int(group.max(initial=0)) + 1, np.inf, np.float32)
    np.minimum.at(lowest, group[kept], score[kept])
    return np.where(np.isinf(lowest), np.float32(np.nan), lowest)[group]


def trajectory_score(
    logprob: Float32[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float32[Array, " B"]:
    """Return s_i, the mean of `logprob` over each row's tokens; 0 on an empty row."""
    total = jnp.sum(jnp.where(mask, logprob, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)


def _rank(
    score: Float32[Array, " B"], group: Int32[Array, " B"], num_groups: int
) -> Int32[Array, " B"]:
    """Return each row's rank within its group in ascending order of score; ties in row order."""
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    order = jnp.lexsort((score, group))
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    size = jnp.sum(group[:, None] == jnp.arange(num_groups)[None, :], axis=0)
    return (place - (jnp.cumsum(size) - size)[group]).astype(jnp.int32)
