"""Losses over the whole vocabulary: the update computes the divergence from both heads.

student hidden, head; teacher hidden, head -> ops/divergence -> student.divergence -> loss f32[B, T]
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Float32
from pydantic import Field, PositiveFloat

from fireopd_jax.config import config
from fireopd_jax.method.losses.base import ExactDivergence, TokenLoss
from fireopd_jax.method.losses.sampled_token import clipped_surrogate, live, mean_of_later
from fireopd_jax.ops.formulas import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    PointwiseClipped,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    bounded_above,
)
from fireopd_jax.types import Array, Batch, TokenStats

Named = Annotated[
    ReverseKL | ForwardKL | JensenShannon | SkewedForwardKL | SkewedReverseKL | AdaptiveKL,
    Field(discriminator="kind"),
]


@config
class VocabularyDivergence(TokenLoss):
    """A divergence of student and teacher over the whole vocabulary at each response token.

    The gradient does not pass through the sampling of the rollout: there is no policy-gradient
    term.

    References: for `pointwise_clip` arXiv 2601.18734, for `token_clip` the code of arXiv
    2606.08432.
    """

    kind: Literal["vocabulary_divergence"] = "vocabulary_divergence"
    """Name of this loss."""
    divergence: Named = JensenShannon()
    """The divergence."""
    pointwise_clip: PositiveFloat | None = None
    """tau of sum_v min(f_v, tau), f_v the terms a log(a/b) of the divergence: OPSD's clip, 0.05
    there; null is none."""
    token_clip: PositiveFloat | None = None
    """Upper bound of the divergence at a token, which has no gradient above it: TRD's code, whose
    control has 0.1; null is none."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.hidden"})

    def __post_init__(self) -> None:
        """Raise ValueError for a clip of terms that the divergence does not have."""
        if self.pointwise_clip is not None and self.divergence.adaptive:
            raise ValueError(
                f"pointwise_clip={self.pointwise_clip:g}: not defined for adaptive_kl, whose "
                "weight depends on all token ids; expected another divergence, or token_clip"
            )

    @property
    def exact_divergence(self) -> ExactDivergence:
        """The divergence that the update computes."""
        divergence = self.divergence
        if self.pointwise_clip is None or divergence.kind == "adaptive_kl":
            return ExactDivergence(divergence)
        return ExactDivergence(PointwiseClipped(divergence, self.pointwise_clip))

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return the divergence at each response token, exactly 0 elsewhere."""
        value = divergence_of(student, batch)
        return value if self.token_clip is None else bounded_above(value, self.token_clip)


@config
class MiniLLM(TokenLoss):
    """The sequence-level reverse KL: exact for the next token, a policy gradient for later tokens.

    l_t = KL(p_t || q_t) + max(-R r, -R clip(r, 1 - eps, 1 + eps)), R the mean of log q - log p over
    the tokens after t: the length-normalised return. Tokens are sampled from the student; the
    paper's sampling from a mixture with the teacher is not implemented.

    References: arXiv 2306.08543.
    """

    kind: Literal["minillm"] = "minillm"
    """Name of this loss."""
    clip: PositiveFloat = 0.2
    """Clipping range eps of the ratio r: beyond 1 +- eps its gradient is 0."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"teacher.hidden", "teacher.logprob", "student.logprob"}
    )
    on_policy: ClassVar[bool] = True
    unfiltered: ClassVar[bool] = True

    @property
    def exact_divergence(self) -> ExactDivergence:
        """The reverse KL, which the update computes."""
        return ExactDivergence(ReverseKL())

    @property
    def whole_rows(self) -> bool:
        """Whether a token's loss depends on others of its row: on the later ones."""
        return True

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l at each response token, exactly 0 elsewhere."""
        mask = batch.rollout.mask
        scores = stop_gradient(batch.scores)
        later = mean_of_later(scores.advantage, mask, batch.row)
        logprob = jnp.where(mask, live(student.logprob, batch), 0.0)
        old = jnp.where(mask, scores.student.logprob, 0.0)
        long = clipped_surrogate(later, logprob, old, self.clip)
        return jnp.where(mask, divergence_of(student, batch) + long, 0.0)


def divergence_of(student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
    """Return the divergence that the update computed, exactly 0 where masked.

    Raises ValueError where the update computed none.
    """
    if student.divergence is None:
        raise ValueError("student statistics lack the divergence: TokenStats.divergence")
    return jnp.where(batch.rollout.mask, live(student.divergence, batch), 0.0)
