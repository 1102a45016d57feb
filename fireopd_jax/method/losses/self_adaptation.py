"""A loss without a teacher, which lowers the probability of the tokens that are trained on.

student log p, entropy -> loss f32[B, T]; the filter chooses the tokens, usually the least likely
"""

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Float32, Int32
from pydantic import Field, PositiveFloat

from fireopd_jax.config import config
from fireopd_jax.method.losses.base import TokenLoss
from fireopd_jax.method.losses.sampled_token import clipped_surrogate, live
from fireopd_jax.types import Array, Batch, TokenStats

Finite = Annotated[float, Field(allow_inf_nan=False)]
EQUAL = 1e-12
"""Range of entropies, in nats, up to which they count as equal."""


@config
class SelfAdaptation(TokenLoss):
    """OPSA: a negative advantage on the kept tokens, larger where the student is less certain.

    A_i = A - delta r_i / 4, r_i = 2 (H_i - H_min) / (H_max - H_min) - 1, with the least and largest
    student entropy H among the kept tokens of the trajectory; r_i is 1 where these are equal.
    l = max(-A_i rho, -A_i clip(rho, 1 - eps, 1 + eps)), rho = pi_theta / pi_old. The tokens are
    chosen by the filter: `least_likely` is the paper's. Without a filter the gradient would be 0 in
    the mean, because A_i does not depend on the sampled token.

    References: arXiv 2608.31046, Eq. 4 and 5. The released code takes H_min and H_max over the
    responses on one device.
    """

    kind: Literal["opsa"] = "opsa"
    """Name of this loss."""
    advantage: Finite = -0.75
    """A, in the middle of the range of advantages; the paper's fixed advantage is -0.5."""
    entropy_slope: Finite = 1.0
    """delta: 1 gives less certain tokens the larger advantage, in size; -1 the smaller; 0 is one
    fixed advantage."""
    clip: PositiveFloat = 0.2
    """Clipping range eps of the ratio rho: beyond 1 +- eps its gradient is 0."""

    on_policy: ClassVar[bool] = True
    unfiltered: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the scores that the loss uses."""
        return frozenset(
            {"student.logprob"} | ({"student.entropy"} if self.entropy_slope else set())
        )

    @property
    def whole_rows(self) -> bool:
        """Whether a token's loss depends on others of its row: on their entropies."""
        return self.entropy_slope != 0

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each token that is trained on, exactly 0 in value and gradient elsewhere."""
        kept = jnp.asarray(batch.rollout.mask) & (batch.coefficient != 0)
        scores = stop_gradient(batch.scores.student)
        logprob = jnp.where(kept, live(student.logprob, batch), 0.0)
        old = jnp.where(kept, scores.logprob, 0.0)
        advantage = jnp.full_like(old, self.advantage)
        if self.entropy_slope:
            rank = 2 * within_row(scores.entropy, kept, batch.row) - 1
            advantage = advantage - self.entropy_slope / 4 * rank
        return jnp.where(kept, clipped_surrogate(advantage, logprob, old, self.clip), 0.0)


def within_row(
    values: Float32[Array, "B T"], kept: Array, row: Int32[Array, "B T"] | None = None
) -> Float32[Array, "B T"]:
    """Return (x - min) / (max - min) over each row's kept values; 1 where all are equal.

    `row` is the row of each token where rows are packed; None: each row of the arrays.
    """
    least = jnp.where(kept, values, jnp.inf)
    most = jnp.where(kept, values, -jnp.inf)
    if row is None:
        low = jnp.min(least, axis=1, keepdims=True, initial=jnp.inf)
        high = jnp.max(most, axis=1, keepdims=True, initial=-jnp.inf)
    else:
        changes = jnp.pad(row[:, 1:] != row[:, :-1], ((0, 0), (1, 0)))
        number, count = jnp.cumsum(changes, axis=1), row.shape[1]
        low = jax.vmap(lambda x, i: jax.ops.segment_min(x, i, count)[i])(least, number)
        high = jax.vmap(lambda x, i: jax.ops.segment_max(x, i, count)[i])(most, number)
    span = high - low
    spread = kept & (span > EQUAL)
    share = jnp.where(spread, values - low, 0.0) / jnp.where(span > EQUAL, span, 1.0)
    return jnp.where(spread, share, 1.0)
