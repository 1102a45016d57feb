"""The base class of the per-token losses."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeVar

from jaxtyping import Float32

from fireopd_jax.method.stage import Stage
from fireopd_jax.ops.formulas import Divergence
from fireopd_jax.types import Array, Batch, TokenStats

Of = TypeVar("Of")


@dataclasses.dataclass(frozen=True)
class ExactDivergence:
    """A divergence over the whole vocabulary, and the model that it is from."""

    divergence: Divergence
    judge: Literal["teacher", "base"] = "teacher"


class TokenLoss(Stage, abc.ABC):
    """Base class of per-token losses; subclasses override what they assume of the rollout."""

    on_policy: ClassVar[bool] = False
    """Whether the loss is exact only for responses sampled from the student."""
    unfiltered: ClassVar[bool] = False
    """Whether the loss is exact only for tokens sampled without top-p, top-k or min-p."""
    corrected_by: ClassVar[str | None] = None
    """Name of the loss's field that corrects for a filtered sampler, if it has one."""
    least_support: ClassVar[int] = 1
    """Smallest support size for which the loss is not identically zero."""
    least_group: ClassVar[int] = 1
    """Smallest `rollout.group_size` that the loss works with."""
    one_update: ClassVar[bool] = False
    """Whether the loss is exact only for the first update on a rollout."""

    @property
    def whole_rows(self) -> bool:
        """Whether the loss of a token depends on other tokens of its row."""
        return False

    @property
    def corrects(self) -> bool:
        """Whether the loss corrects for a sampler that differs from the scored policy."""
        return self.corrected_by is not None and getattr(self, self.corrected_by) is not None

    @property
    def exact_divergence(self) -> ExactDivergence | None:
        """The divergence over the vocabulary that the update computes for this loss, if any."""
        return None

    def judge(self, teachers: Sequence[Of], base: Of) -> Of | None:
        """Return the one of these that `exact_divergence` is from, or None without one.

        They may be models, parameters or hidden states.
        """
        exact = self.exact_divergence
        if exact is None:
            return None
        return base if exact.judge == "base" else teachers[0]

    @abc.abstractmethod
    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return the unweighted loss of each response token.

        `student` carries the gradient. `student.support` is set where the scores have a support,
        `student.divergence` where `exact_divergence` is not None.
        """
