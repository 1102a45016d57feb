"""Base classes of the stages of a method.

    stage.needs             fields of the scores that it uses
    stage.init(rows)        its state before the first step: () for a stateless stage
    stage(..., state)       its result, and the state for the next step

A stage is a frozen dataclass; other code uses these attributes and never checks its class.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float32

from fireopd_jax.metrics import Metric
from fireopd_jax.types import Array, Scores, StageContext

StageState = Any
"""A pytree of arrays; () for a stateless stage."""
Keep = Bool[Array, " B"] | Bool[Array, "B T"]
"""True on the trajectories, or on the tokens, that are trained on."""


class Stage:
    """Base class of stages; by default stateless, using no field of the scores."""

    kind: str
    """Name of the variant; each subclass declares it as a field."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Scores` that the stage uses, such as "teacher.entropy"."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts whose token ids `StageContext.special` must hold for this stage."""
        return ()

    def init(self, batch_size: int) -> StageState:
        """Return the state before the first step, for batches of `batch_size` trajectories."""
        return ()

    def problems(self, batch_size: int) -> Iterator[str]:
        """Yield what is wrong with these settings for batches of `batch_size` trajectories."""
        return iter(())


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a filter has kept, and the number that it judged each row by; for reports."""

    kind: str
    keep: Keep
    score: Float32[Array, " B"] | None = None
    """None for filters of single tokens."""
    threshold: Float32[Array, " B"] | None = None
    """The last score that is kept among the rows that a row is ranked with, or a fixed limit."""


class Filter(Stage, abc.ABC):
    """A stage that chooses the trajectories, or tokens, that are trained on."""

    @property
    def follows_progress(self) -> bool:
        """Whether it depends on `StageContext.progress`, and so on the length of the run."""
        return False

    @abc.abstractmethod
    def __call__(
        self, scores: Scores, context: StageContext, state: StageState = ()
    ) -> tuple[Keep, StageState]:
        """Return the keep mask, and the state for the next step."""

    def metrics(
        self, scores: Scores, context: StageContext, state: StageState
    ) -> dict[str, Metric]:
        """Return metrics specific to this filter, by name."""
        return {}

    def judged(
        self, scores: Scores, context: StageContext, keep: Keep, state: StageState = ()
    ) -> list[Judged]:
        """Return how each filter in this one has judged the rows; `keep` is what it has returned.

        No part of a step's program: only called for the batches that are written to files.
        """
        return [Judged(self.kind, keep, *self.measured(scores, context, keep))]

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> tuple[Float32[Array, " B"] | None, Float32[Array, " B"] | None]:
        """Return score and threshold of each row, for `judged`; None where there is none."""
        return None, None


class StatelessFilter(Filter):
    """A filter that is a function of the batch alone."""

    @abc.abstractmethod
    def keep(self, scores: Scores, context: StageContext) -> Keep:
        """Return the keep mask."""

    def __call__(
        self, scores: Scores, context: StageContext, state: StageState = ()
    ) -> tuple[Keep, StageState]:
        """Return the keep mask, and the state as it is."""
        return self.keep(scores, context), state


class Reweighting(Stage, abc.ABC):
    """A stage that weights the tokens of each trajectory; weights carry no gradient."""

    kernel_strengths: ClassVar[tuple[float, float] | None] = None
    """(alpha, beta) where the scoring kernel computes the raw token weight, else None."""

    @abc.abstractmethod
    def __call__(
        self, scores: Scores, context: StageContext, keep: Keep, state: StageState = ()
    ) -> tuple[Float32[Array, "B T"], StageState]:
        """Return the weight of each token, 0 where masked, and the state for the next step."""

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> Mapping[str, Float32[Array, " B"]]:
        """Return the numbers of each row that its tokens' weights are made of, by name.

        No part of a step's program: only called for the batches that are written to files.
        """
        return {}


class StatelessReweighting(Reweighting):
    """A reweighting that is a function of the batch alone."""

    @abc.abstractmethod
    def weight(self, scores: Scores, context: StageContext, keep: Keep) -> Float32[Array, "B T"]:
        """Return the weight of each token, 0 where masked."""

    def __call__(
        self, scores: Scores, context: StageContext, keep: Keep, state: StageState = ()
    ) -> tuple[Float32[Array, "B T"], StageState]:
        """Return the weight of each token, and the state as it is."""
        return self.weight(scores, context, keep), state


Aggregate = Literal["seq", "token"]
"""Each kept trajectory counts once, or each kept token."""
