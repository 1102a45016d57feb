"""Several filters at once."""

from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.filtering.guards import GapBound, Prefix, RepetitionGuard, SpecialTokens
from fireopd_jax.method.filtering.tokens import HardTokens, Reopold, Tip
from fireopd_jax.method.filtering.trajectories import (
    KeepAll,
    LengthDrop,
    RandomDrop,
    TeacherQuantile,
)
from fireopd_jax.types import Array, Rows, Scores

Filters = (
    KeepAll
    | TeacherQuantile
    | RandomDrop
    | LengthDrop
    | Reopold
    | Tip
    | HardTokens
    | RepetitionGuard
    | Prefix
    | SpecialTokens
    | GapBound
)


@config
class AllOf:
    """Keep what all of several filters keep; each looks at what those before it have left."""

    kind: Literal["all_of"] = "all_of"
    """Name of this filter."""
    filters: Annotated[
        tuple[Annotated[Filters, Field(discriminator="kind")], ...], Field(min_length=1)
    ] = (RepetitionGuard(), TeacherQuantile())
    """The filters, in order."""

    @property
    def needs(self) -> frozenset[str]:
        """What the score must give."""
        return frozenset().union(*(each.needs for each in self.filters))

    @property
    def window(self) -> int:
        """Earlier batches that the one among them which ranks by any ranks by."""
        return max(map(window_of, self.filters))

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        return self.left(scores, rows)[-1]

    def left(self, scores: Scores, rows: Rows) -> list[Bool[Array, "B T"]]:
        """Return the tokens that are left after each of the filters."""
        masks = []
        for each in self.filters:
            rows = left_by(each, scores, rows)
            masks.append(jnp.asarray(rows.mask))
        return masks

    def remember(
        self, scores: Scores, rows: Rows, recent: Float32[Array, "W B 2"]
    ) -> Float32[Array, "W B 2"]:
        """Keep the scores of the rows as the filter that ranks them has seen them."""
        for each in self.filters:
            if isinstance(each, TeacherQuantile) and each.window:
                return each.remember(scores, rows, recent)
            rows = left_by(each, scores, rows)
        return recent


def left_by(filter: Filters, scores: Scores, rows: Rows) -> Rows:
    """Give the rows without the tokens that a filter drops."""
    keep = filter(scores, rows)
    return rows.masked(rows.mask & (keep if keep.ndim == 2 else keep[:, None]))


def window_of(filter: Filters | AllOf) -> int:
    """Tell by how many earlier batches a filter ranks, too."""
    return filter.window if isinstance(filter, TeacherQuantile | AllOf) else 0
