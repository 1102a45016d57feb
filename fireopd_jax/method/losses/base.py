"""The base class of the per-token losses."""

import abc
from typing import ClassVar

from jaxtyping import Float32

from fireopd_jax.method.stage import Stage
from fireopd_jax.ops.formulas import Divergence
from fireopd_jax.types import Array, Batch, TokenStats


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

    @property
    def corrects(self) -> bool:
        """Whether the loss corrects for a sampler that differs from the scored policy."""
        return self.corrected_by is not None and getattr(self, self.corrected_by) is not None

    @property
    def divergence_from_teacher(self) -> Divergence | None:
        """The divergence over the vocabulary that the update computes for this loss, if any."""
        return None

    @abc.abstractmethod
    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return the unweighted loss of each response token.

        `student` carries the gradient. `student.support` is set where the scores have a support,
        `student.divergence` where `divergence_from_teacher` is not None.
        """
