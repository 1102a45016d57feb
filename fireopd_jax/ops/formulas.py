"""The divergences of two distributions, term by term, in log-probabilities.

log p, log q (student, teacher) of some words -> one term a word; the divergence is their sum

Every one is made of generalised Kullback-Leibler terms a log(a/b) - a + b. Over a whole vocabulary
the linear parts cancel; of a part of it they make the sum a divergence still: each term is >= 0,
and 0 with slope 0 where a = b. Log-probabilities are finite: who has -inf passes a very low number.
"""

import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import Field

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.types import Array

Terms = Float[Array, "*N"]


def kl_terms(log_a: Terms, log_b: Terms) -> Terms:
    """Return a log(a/b) - a + b, whose sum is KL(a || b)."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    return a * (log_a - log_b) - a + b


def _mixture(log_a: Terms, log_b: Terms, share: float) -> Terms:
    """Return log(share a + (1 - share) b)."""
    if share in (0.0, 1.0):
        return log_a if share else log_b
    return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


@config
class ReverseKL:
    """KL(student || teacher) = sum_v p (log p - log q); gradient to the logits p (rho - KL)."""

    kind: Literal["reverse_kl"] = "reverse_kl"

    adaptive: ClassVar[bool] = False

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return its terms."""
        return kl_terms(log_p, log_q)


@config
class ForwardKL:
    """KL(teacher || student) = sum_v q (log q - log p); gradient to the logits p - q."""

    kind: Literal["forward_kl"] = "forward_kl"

    adaptive: ClassVar[bool] = False

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return its terms."""
        return kl_terms(log_q, log_p)


@config
class JensenShannon:
    """GKD's beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta q + (1 - beta) p.

    At beta = 0 it is the forward KL and at 1 the reverse KL, as in the authors' and TRL's code;
    close to the ends it is beta and 1 - beta times these: the scale of the gradient jumps there.

    References: arXiv 2306.13649.
    """

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: UnitInterval = 0.5
    """Share beta of the teacher in the mixture M, and of its own divergence in the sum."""

    adaptive: ClassVar[bool] = False

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return its terms."""
        beta = self.beta
        if beta in (0.0, 1.0):
            return kl_terms(log_p, log_q) if beta else kl_terms(log_q, log_p)
        log_m = _mixture(log_q, log_p, beta)
        return beta * kl_terms(log_q, log_m) + (1 - beta) * kl_terms(log_p, log_m)


Skew = Annotated[float, Field(ge=0, lt=1)]


@config
class SkewedForwardKL:
    """KL(teacher || alpha q + (1 - alpha) p): finite where the student has no mass.

    References: arXiv 2402.03898 (DistiLLM).
    """

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    alpha: Skew = 0.1
    """Share of the teacher in the mixture."""

    adaptive: ClassVar[bool] = False

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return its terms."""
        return kl_terms(log_q, _mixture(log_q, log_p, self.alpha))


@config
class SkewedReverseKL:
    """KL(student || (1 - alpha) q + alpha p): finite where the teacher has no mass.

    References: arXiv 2402.03898 (DistiLLM).
    """

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: Skew = 0.1
    """Share of the student in the mixture."""

    adaptive: ClassVar[bool] = False

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return its terms."""
        return kl_terms(log_p, _mixture(log_p, log_q, self.alpha))


@config
class AdaptiveKL:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), token by token.

    w = sum_H |q - p| / sum_V |q - p|, which has no gradient. H: the teacher's most probable words,
    as many as hold no more than mu together, and the first in any case; words of equal probability
    at the head_threshold stand on one side together.

    References: arXiv 2404.02657.
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    mu: UnitInterval = 0.5
    """Mass of the teacher's head H."""

    adaptive: ClassVar[bool] = True

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return its terms; `share` is w."""
        if share is None:
            raise ValueError("adaptive_kl needs w, the share of the forward KL")
        w = jax.lax.stop_gradient(share)
        return w * kl_terms(log_q, log_p) + (1 - w) * kl_terms(log_p, log_q)

    def head_threshold(self, z: Float[Array, "N V"]) -> Float[Array, " N"]:
        """Return the logit that parts H from the rest, half-way between two, of whole rows."""
        ordered = -jnp.sort(-z, axis=1)
        held = jnp.cumsum(jax.nn.softmax(ordered, axis=1), axis=1)
        # The 1e-5 forgives the rounding of a cumulative sum that is exactly mu.
        last = jnp.maximum((held <= self.mu + 1e-5).sum(axis=1) - 1, 0)
        after = jnp.minimum(last + 1, z.shape[1] - 1)
        inside, outside = (
            jnp.take_along_axis(ordered, at[:, None], axis=1)[:, 0] for at in (last, after)
        )
        # H of everything has no outside.
        outside = jnp.where(last == after, inside - 1.0, outside)
        return jnp.where(jnp.isfinite(outside), (inside + outside) / 2, inside - 1.0)


Divergence = ReverseKL | ForwardKL | JensenShannon | SkewedForwardKL | SkewedReverseKL | AdaptiveKL
