"""Several filters applied in sequence."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Bool
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.filtering.guards import GapBound, Prefix, RepetitionGuard, SpecialTokens
from fireopd_jax.method.filtering.tokens import HardTokens, LeastLikely, Reopold, Tip
from fireopd_jax.method.filtering.trajectories import (
    KeepAll,
    LengthDrop,
    RandomDrop,
    TeacherQuantile,
)
from fireopd_jax.method.stage import Filter, Judged, Keep, StageState
from fireopd_jax.metrics import Mean, Metric
from fireopd_jax.types import Array, Scores, StageContext

Filters = (
    KeepAll
    | TeacherQuantile
    | RandomDrop
    | LengthDrop
    | Reopold
    | Tip
    | HardTokens
    | LeastLikely
    | RepetitionGuard
    | Prefix
    | SpecialTokens
    | GapBound
)


@config
class AllOf(Filter):
    """Keep what every filter keeps; each filter ranks only what the previous ones have kept."""

    kind: Literal["all_of"] = "all_of"
    """Name of this filter."""
    filters: Annotated[
        tuple[Annotated[Filters, Field(discriminator="kind")], ...], Field(min_length=1)
    ] = (RepetitionGuard(), TeacherQuantile())
    """The filters, in order."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the scores that any of the filters uses."""
        return frozenset().union(*(each.needs for each in self.filters))

    @property
    def follows_progress(self) -> bool:
        """Whether any of the filters depends on the share of the updates that are done."""
        return any(each.follows_progress for each in self.filters)

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts whose token ids any of the filters needs."""
        return tuple(text for each in self.filters for text in each.texts)

    def problems(self, batch_size: int) -> Iterator[str]:
        """Yield the problems of each filter, with its index."""
        for index, each in enumerate(self.filters):
            yield from (f"filters.{index}.{problem}" for problem in each.problems(batch_size))

    def init(self, batch_size: int) -> StageState:
        """Return the state of each filter."""
        return tuple(each.init(batch_size) for each in self.filters)

    def __call__(
        self, scores: Scores, context: StageContext, state: StageState = ()
    ) -> tuple[Bool[Array, "B T"], StageState]:
        """Return the tokens that all filters keep, and the states for the next step."""
        masks, states = self._successive(scores, context, state)
        return masks[-1], states

    def metrics(
        self, scores: Scores, context: StageContext, state: StageState
    ) -> dict[str, Metric]:
        """Return, for each filter, the fraction kept of the tokens that the previous ones left.

        A second filter of the same kind is named `KIND_2`.
        """
        before, seen, out = jnp.asarray(context.mask), Counter[str](), {}
        for each, after in zip(
            self.filters, self._successive(scores, context, state)[0], strict=True
        ):
            seen[each.kind] += 1
            name = each.kind if seen[each.kind] == 1 else f"{each.kind}_{seen[each.kind]}"
            out[f"method/keep_fraction_by_{name}"] = Mean.of(after, before)
            before = after
        return out

    def judged(
        self, scores: Scores, context: StageContext, keep: Keep, state: StageState = ()
    ) -> list[Judged]:
        """Return how each filter has judged what the previous ones have kept."""
        found: list[Judged] = []
        masks, _ = self._successive(scores, context, state)
        for each, mask in zip(self.filters, masks, strict=True):
            found.append(Judged(each.kind, mask, *each.measured(scores, context, mask)))
            context = context.masked(mask)
        return found

    def _successive(
        self, scores: Scores, context: StageContext, state: StageState
    ) -> tuple[list[Bool[Array, "B T"]], StageState]:
        """Return the keep mask after each filter in sequence, and the filters' new states."""
        masks, states = [], []
        for each, own in zip(self.filters, state or [()] * len(self.filters), strict=True):
            keep, own = each(scores, context, own)
            context = context.masked(context.mask & (keep if keep.ndim == 2 else keep[:, None]))
            masks.append(jnp.asarray(context.mask))
            states.append(own)
        return masks, tuple(states)
