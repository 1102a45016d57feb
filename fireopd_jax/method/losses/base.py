"""What every loss answers to the update."""

from fireopd_jax.ops.formulas import Divergence


class TokenLoss:
    """A loss that reads the student's statistics alone, unless it says otherwise."""

    @property
    def divergence_from_teacher(self) -> Divergence | None:
        """The divergence over the whole vocabulary that the update must compute, if any."""
        return None
