"""Divergences of two distributions, term by term, in log-probabilities.

    log p, log q (student, teacher) of some token ids -> one term per id; the divergence is the sum

Every divergence is built from generalised Kullback-Leibler terms a log(a/b) - a + b. Over a whole
vocabulary the linear parts cancel; over a part of it they keep the sum a divergence: each term is
>= 0, and 0 with slope 0 where a = b. `PointwiseClipped` bounds the plain terms a log(a/b) instead.
Log-probabilities must be finite: in place of -inf pass a very low number.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import Field

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.types import Array

Terms = Float[Array, "*N"]


def kl_terms(log_a: Terms, log_b: Terms) -> Terms:
    """Return a log(a/b) - a + b elementwise in nats, whose sum is KL(a || b)."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    return a * (log_a - log_b) - a + b


def plain_kl_terms(log_a: Terms, log_b: Terms) -> Terms:
    """Return a log(a/b) elementwise in nats: negative where a < b, with the same sum as above."""
    return jnp.exp(log_a) * (log_a - log_b)


KLTerms = Callable[[Terms, Terms], Terms]
"""The terms of KL(a || b) from log a and log b: generalised or plain."""


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

    def __call__(
        self, log_p: Terms, log_q: Terms, share: Array | None = None, kl: KLTerms = kl_terms
    ) -> Terms:
        """Return the terms in nats, of the shape of `log_p`; `share` is unused."""
        return kl(log_p, log_q)


@config
class ForwardKL:
    """KL(teacher || student) = sum_v q (log q - log p); gradient to the logits p - q."""

    kind: Literal["forward_kl"] = "forward_kl"

    adaptive: ClassVar[bool] = False

    def __call__(
        self, log_p: Terms, log_q: Terms, share: Array | None = None, kl: KLTerms = kl_terms
    ) -> Terms:
        """Return the terms in nats, of the shape of `log_p`; `share` is unused."""
        return kl(log_q, log_p)


@config
class JensenShannon:
    """GKD's beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta q + (1 - beta) p.

    beta = 0 is the forward KL and beta = 1 the reverse KL, as in the authors' and TRL's code. Near
    the ends the value tends to beta or 1 - beta times these, so the scale of the gradient jumps at
    0 and 1.

    References: arXiv 2306.13649.
    """

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: UnitInterval = 0.5
    """Weight beta of the teacher in the mixture M, and of KL(teacher || M) in the sum."""

    adaptive: ClassVar[bool] = False

    def __call__(
        self, log_p: Terms, log_q: Terms, share: Array | None = None, kl: KLTerms = kl_terms
    ) -> Terms:
        """Return the terms in nats, of the shape of `log_p`; `share` is unused."""
        beta = self.beta
        if beta in (0.0, 1.0):
            return kl(log_p, log_q) if beta else kl(log_q, log_p)
        log_m = _mixture(log_q, log_p, beta)
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


Skew = Annotated[float, Field(ge=0, lt=1)]


@config
class SkewedForwardKL:
    """KL(teacher || alpha q + (1 - alpha) p): finite where the student has no mass.

    References: arXiv 2402.03898 (DistiLLM).
    """

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    alpha: Skew = 0.1
    """Weight of the teacher in the mixture."""

    adaptive: ClassVar[bool] = False

    def __call__(
        self, log_p: Terms, log_q: Terms, share: Array | None = None, kl: KLTerms = kl_terms
    ) -> Terms:
        """Return the terms in nats, of the shape of `log_p`; `share` is unused."""
        return kl(log_q, _mixture(log_q, log_p, self.alpha))


@config
class SkewedReverseKL:
    """KL(student || (1 - alpha) q + alpha p): finite where the teacher has no mass.

    References: arXiv 2402.03898 (DistiLLM).
    """

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    alpha: Skew = 0.1
    """Weight of the student in the mixture."""

    adaptive: ClassVar[bool] = False

    def __call__(
        self, log_p: Terms, log_q: Terms, share: Array | None = None, kl: KLTerms = kl_terms
    ) -> Terms:
        """Return the terms in nats, of the shape of `log_p`; `share` is unused."""
        return kl(log_p, _mixture(log_p, log_q, self.alpha))


@config
class AdaptiveKL:
    """w KL(teacher || student) + (1 - w) KL(student || teacher), token by token.

    w = sum_H |q - p| / sum_V |q - p|, without gradient. H is the set of the teacher's most probable
    token ids whose cumulative probability is at most mu, and at least the most probable one. Ids of
    equal probability at the threshold are all inside or all outside.

    References: arXiv 2404.02657.
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    mu: UnitInterval = 0.5
    """Teacher probability of the set H."""

    adaptive: ClassVar[bool] = True

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return the terms in nats; `share` is w. Raises ValueError without it."""
        if share is None:
            raise ValueError("adaptive_kl needs share, the weight w of the forward KL")
        w = jax.lax.stop_gradient(share)
        return w * kl_terms(log_q, log_p) + (1 - w) * kl_terms(log_p, log_q)

    def head_threshold(self, z: Float[Array, "N V"]) -> Float[Array, " N"]:
        """Return the logit that separates H from the rest, from whole rows of teacher logits `z`.

        It lies midway between the lowest logit inside and the highest outside.
        """
        ordered = -jnp.sort(-z, axis=1)
        held = jnp.cumsum(jax.nn.softmax(ordered, axis=1), axis=1)
        # 1e-5 absorbs the rounding of a cumulative sum that is exactly mu.
        last = jnp.maximum((held <= self.mu + 1e-5).sum(axis=1) - 1, 0)
        after = jnp.minimum(last + 1, z.shape[1] - 1)
        inside, outside = (
            jnp.take_along_axis(ordered, at[:, None], axis=1)[:, 0] for at in (last, after)
        )
        # If H is the whole vocabulary, no id is outside.
        outside = jnp.where(last == after, inside - 1.0, outside)
        return jnp.where(jnp.isfinite(outside), (inside + outside) / 2, inside - 1.0)


FixedWeights = ReverseKL | ForwardKL | JensenShannon | SkewedForwardKL | SkewedReverseKL
"""The divergences whose terms do not depend on the other token ids."""


@dataclasses.dataclass(frozen=True)
class PointwiseClipped:
    """sum_v min(f_v, tau), f_v the plain terms a log(a/b) of another divergence.

    A term above tau has no gradient. Negative terms are not bounded, so the sum can be negative; at
    p = q it is 0 and stationary, but need not be the lowest.

    References: arXiv 2601.18734 (OPSD) as updated in March 2026, and its code.
    """

    divergence: FixedWeights
    limit: float
    """tau, in nats."""

    adaptive: ClassVar[bool] = False

    def __call__(self, log_p: Terms, log_q: Terms, share: Array | None = None) -> Terms:
        """Return the bounded terms in nats, of the shape of `log_p`; `share` is unused."""
        return bounded_above(self.divergence(log_p, log_q, share, plain_kl_terms), self.limit)


def bounded_above(value: Array, limit: float) -> Array:
    """Return min(value, limit), with no gradient where the limit is exceeded.

    At equality the gradient is whole; that of `jnp.minimum` would be halved. NaN stays NaN.
    """
    return jnp.where(value > limit, limit, value)


Divergence = FixedWeights | AdaptiveKL | PointwiseClipped
