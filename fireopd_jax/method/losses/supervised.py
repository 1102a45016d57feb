"""Supervised losses, which need no teacher."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Float32

from fireopd_jax.config import config
from fireopd_jax.method.losses.base import TokenLoss
from fireopd_jax.types import Array, Batch, TokenStats


@config
class NegativeLogLikelihood(TokenLoss):
    """The negative log-likelihood of each response token: l = -log pi_theta."""

    kind: Literal["negative_log_likelihood"] = "negative_log_likelihood"
    """Name of this loss."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each response token, exactly 0 in value and gradient elsewhere."""
        return jnp.where(batch.rollout.mask, -student.logprob, 0.0)
