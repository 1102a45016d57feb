"""Several filters at once."""

from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Bool
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.filtering.guards import GapBound, Prefix, RepetitionGuard, SpecialTokens
from fireopd_jax.filtering.tokens import HardTokens, Reopold, Tip
from fireopd_jax.filtering.trajectories import KeepAll, LengthDrop, RandomDrop, TeacherQuantile
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

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        mask = jnp.asarray(rows.mask)
        for each in self.filters:
            keep = each(scores, rows.masked(mask))
            mask = mask & (keep if keep.ndim == 2 else keep[:, None])
        return mask


def ranking(filter: Filters | AllOf) -> TeacherQuantile | None:
    """Find the filter that ranks by earlier batches, too, if there is one."""
    filters = filter.filters if isinstance(filter, AllOf) else (filter,)
    windowed = (each for each in filters if isinstance(each, TeacherQuantile) and each.window)
    return next(windowed, None)
