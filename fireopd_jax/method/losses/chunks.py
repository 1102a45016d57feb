"""The loss of audited chunks: a policy gradient on them, an anchor to the start elsewhere.

chunks of the scores; student logprob, divergence from the base policy -> loss f32[B, T]
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Float32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.losses.base import ExactDivergence, TokenLoss
from fireopd_jax.method.losses.sampled_token import live, of_tokens
from fireopd_jax.method.losses.vocabulary import divergence_of
from fireopd_jax.ops.formulas import ForwardKL
from fireopd_jax.types import Array, Batch, TokenStats


@config
class ChunkPolicyGradient(TokenLoss):
    """A policy gradient with the posterior weight of each audited chunk as its reward.

    l_t = -pi-hat log pi_theta(y_t)         on the tokens of audited chunks
    l_t = beta KL(pi_base || pi_theta)      on the other response tokens, over the whole vocabulary

    The gradients to the logits are pi-hat (p - onehot(y_t)) and beta (p - p_base). pi-hat has no
    gradient. It is never negative, so that chunks are only pushed up; what the teacher rarely
    writes loses against what it often writes because probabilities sum to 1.

    References: arXiv 2606.01476 (OmniOPD); the baseline is an addition of this package.
    """

    kind: Literal["chunk_policy_gradient"] = "chunk_policy_gradient"
    """Name of this loss."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Weight of the KL from the base policy; without it the paper's runs collapse."""
    baseline: Literal["none", "leave_one_out"] = "none"
    """`leave_one_out` subtracts the mean pi-hat of the prompt's other responses, to lower the
    variance of the gradient; the paper subtracts nothing. Its expected gradient is small but not
    exactly 0, since which tokens are audited depends on the whole response."""

    needs: ClassVar[frozenset[str]] = frozenset({"chunks", "base.hidden"})
    on_policy: ClassVar[bool] = True
    unfiltered: ClassVar[bool] = True
    one_update: ClassVar[bool] = True

    @property
    def least_group(self) -> int:
        """2 with `leave_one_out`: a single response has no others."""
        return 2 if self.baseline == "leave_one_out" else 1

    @property
    def exact_divergence(self) -> ExactDivergence:
        """KL(base || student), which the update computes."""
        return ExactDivergence(ForwardKL(), "base")

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l on each response token, exactly 0 in value and gradient elsewhere.

        Raises ValueError where the scores have no audited chunks.
        """
        mask, chunks = batch.rollout.mask, batch.scores.chunks
        if chunks is None:
            raise ValueError(
                "this loss needs audited chunks: expected method.score.kind=chunk_agreement"
            )
        reward = jnp.asarray(chunks.target)
        if self.baseline == "leave_one_out":
            reward = reward - of_tokens(jnp.asarray(chunks.baseline))
        logprob = jnp.where(mask, live(student.logprob, batch), 0.0)
        anchor = self.beta * divergence_of(student, batch)
        value = jnp.where(chunks.audited, -stop_gradient(reward) * logprob, anchor)
        return jnp.where(mask, value, 0.0)
