"""Losses that compare student and teacher on a support S of few token ids.

    student log p(S) (with gradient), teacher log q(S) -> loss f32[B, T]

log p and log q are over the whole vocabulary; Z_p and Z_q are the probability masses on S. The
losses differ in how they treat the mass outside S: see docs/objectives.md. The plain derivative of
sum_S p (log p - log q) pushes mass out of S (its fixed point is Z_p = Z_q / e) and is not offered.
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.special import logsumexp
from jaxtyping import Bool, Float32
from pydantic import Field, NonNegativeFloat, PositiveFloat

from fireopd_jax.config import config
from fireopd_jax.method.losses.base import TokenLoss
from fireopd_jax.method.losses.sampled_token import bounded_exp, live, sampled_reverse_kl
from fireopd_jax.ops.formulas import (
    ForwardKL,
    JensenShannon,
    PointwiseClipped,
    ReverseKL,
    bounded_above,
)
from fireopd_jax.types import Array, Batch, Support, TokenStats

NOTHING = -1e30
"""Log-probability of an empty slot: finite, so that no difference is NaN."""
FULL = -1e-7
"""Upper bound of log Z in `tail_bucket`, so that log(1 - Z) stays finite."""

Few = Float32[Array, "B T S"]


@config
class SupportDivergence(TokenLoss):
    """A divergence of student and teacher on a support S; local support matching by default.

    renormalised  D(p/Z_p || q/Z_q): Z_p is unconstrained (arXiv 2603.25562, Eq. 6-8)
    score         sum_S of generalised terms, KL: p log(p/q) - p + q; its fixed point is p = q on S
    tail_bucket   D over S and one bucket for the rest, of mass 1 - Z_p against 1 - Z_q
    tail_sample   sum_S p log(p/q), and for a sampled y outside S log p(y)/q(y): unbiased for the
                  KL over the whole vocabulary, in value and gradient, if y is drawn from p

    The published gradient of the last (EMA-PG) lacks the term of 1 - Z_p; here it is
    sum_S grad [p log(p/q)] + [y not in S] (log p(y)/q(y) + 1) grad log p(y).
    """

    kind: Literal["support_divergence"] = "support_divergence"
    """Name of this loss."""
    head: Literal["renormalised", "score", "tail_bucket", "tail_sample"] = "renormalised"
    """How the mass outside the support is treated."""
    divergence: Annotated[ReverseKL | ForwardKL | JensenShannon, Field(discriminator="kind")] = (
        ReverseKL()
    )
    """The divergence; `tail_sample` estimates the reverse KL only."""
    pointwise_clip: PositiveFloat | None = None
    """tau of sum_S min(f, tau), f the terms a log(a/b) of the renormalised distributions: OPSD's
    clip, 0.05 there; null is none."""
    token_clip: PositiveFloat | None = None
    """Upper bound of the value at a token, which has no gradient above it; null is none."""

    needs: ClassVar[frozenset[str]] = frozenset({"support"})

    def __post_init__(self) -> None:
        """Raise ValueError for a divergence, or a clip, that the head does not have."""
        if self.head == "tail_sample" and self.divergence.kind != "reverse_kl":
            raise ValueError(
                f"divergence={self.divergence.kind}: head=tail_sample estimates the reverse KL "
                "only; expected reverse_kl, or head=tail_bucket"
            )
        if self.pointwise_clip is not None and self.head != "renormalised":
            raise ValueError(
                f"pointwise_clip={self.pointwise_clip:g}: head={self.head} has other terms; "
                "expected head=renormalised, or token_clip"
            )

    @property
    def on_policy(self) -> bool:
        """Whether responses must be the student's: the tail estimate assumes y sampled from p."""
        return self.head == "tail_sample"

    @property
    def unfiltered(self) -> bool:
        """Whether sampling must be unfiltered: the tail estimate assumes y sampled from p."""
        return self.head == "tail_sample"

    @property
    def least_support(self) -> int:
        """2 if renormalised: on a single token both distributions are 1 and the loss is 0."""
        return 2 if self.head == "renormalised" else 1

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return the divergence at each response token, exactly 0 elsewhere.

        Raises ValueError where scores or student statistics have no support.
        """
        log_p, log_q, valid = on_support(student, batch)
        if self.head == "renormalised":
            terms: Divergence = self.divergence
            if self.pointwise_clip is not None:
                terms = PointwiseClipped(self.divergence, self.pointwise_clip)
            value = renormalised(terms, log_p, log_q, valid)
        elif self.head == "score":
            value = score_form(self.divergence, log_p, log_q, valid)
        elif self.head == "tail_bucket":
            value = tail_bucket(self.divergence, log_p, log_q, valid)
        else:
            tokens, support = batch.rollout.tokens, _support(batch)
            outside = ~(jnp.asarray(support.ids) == jnp.asarray(tokens)[..., None]).any(axis=-1)
            logprob, old, teacher = _sampled(student, batch)
            value = tail_sample(log_p, log_q, valid, logprob, old, teacher, outside)
        if self.token_clip is not None:
            value = bounded_above(value, self.token_clip)
        return jnp.where(batch.rollout.mask, value, 0.0)


@config
class SupportPolicyGradient(TokenLoss):
    """A policy gradient with every token id of the support as an action.

    Value sum_S w (log p - log q), gradient sum_S w (log p - log q) grad log p, no gradient in w.
    With `student` weights the gradient is that of `score` divided by Z_p. The sum over S is exact,
    so there is no importance ratio to clip.

    References: arXiv 2604.13016 and its code.
    """

    kind: Literal["support_policy_gradient"] = "support_policy_gradient"
    """Name of this loss."""
    weight: Literal["student", "teacher", "none"] = "student"
    """w: p / Z_p, q / Z_q, or 1 over the number of token ids of the support."""

    needs: ClassVar[frozenset[str]] = frozenset({"support"})

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return the value at each response token, exactly 0 elsewhere."""
        log_p, log_q, valid = on_support(student, batch)
        log_w = {"student": log_p, "teacher": log_q, "none": jnp.zeros_like(log_q)}[self.weight]
        log_w = jnp.where(valid, log_w, NOTHING)
        weight = jnp.exp(log_w - logsumexp(log_w, axis=-1, keepdims=True))
        cost = stop_gradient(jnp.where(valid, weight * (log_p - log_q), 0.0))
        log_p = jnp.where(valid, log_p, 0.0)
        value = cost * (1.0 + log_p - stop_gradient(log_p))
        return jnp.where(batch.rollout.mask, value.sum(axis=-1), 0.0)


@config
class EntropyAware(TokenLoss):
    """The sampled reverse KL, plus the forward KL where the teacher's entropy is high.

    l = max(-A r, -A clip(r)) + alpha [H(q) > tau] sum_S q (log q - log p), p over the whole
    vocabulary. The second term is Z_q times a cross-entropy: its gradient Z_q p - q on S drives Z_p
    to 1 and does not vanish at p = q, whatever `normalise`.

    References: arXiv 2603.07079 and its code.
    """

    kind: Literal["entropy_aware"] = "entropy_aware"
    """Name of this loss."""
    alpha: NonNegativeFloat = 1.0
    """Weight of the forward term."""
    tau: NonNegativeFloat = 0.8
    """Teacher entropy, in nats, above which the forward term is added."""
    normalise: bool = False
    """Divide q by Z_q, as a later implementation does; the authors' code does not."""
    clip: PositiveFloat = 0.2
    """Clipping range eps of the ratio r: beyond 1 +- eps its gradient is 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"support", "teacher.entropy", "teacher.logprob"})
    on_policy: ClassVar[bool] = True
    unfiltered: ClassVar[bool] = True

    def __call__(self, student: TokenStats, batch: Batch) -> Float32[Array, "B T"]:
        """Return l at each response token, exactly 0 elsewhere."""
        mask = batch.rollout.mask
        log_p, log_q, valid = on_support(student, batch)
        sampled = sampled_reverse_kl(*_sampled(student, batch), self.clip)
        unsure = jnp.where(mask, batch.scores.teacher_stats.entropy, 0.0) > self.tau
        forward = forward_kl(log_p, log_q, valid, self.normalise)
        return jnp.where(mask, sampled + self.alpha * jnp.where(unsure, forward, 0.0), 0.0)


Divergence = ReverseKL | ForwardKL | JensenShannon | PointwiseClipped


def renormalised(
    divergence: Divergence, log_p: Few, log_q: Few, valid: Bool[Array, "B T S"]
) -> Float32[Array, "B T"]:
    """Return D(p/Z_p || q/Z_q); its gradient is exactly 0 outside S and sums to 0 on it."""
    terms = divergence(
        log_p - logsumexp(log_p, axis=-1, keepdims=True),
        log_q - logsumexp(log_q, axis=-1, keepdims=True),
    )
    return jnp.where(valid, terms, 0.0).sum(axis=-1)


def score_form(
    divergence: Divergence, log_p: Few, log_q: Few, valid: Bool[Array, "B T S"]
) -> Float32[Array, "B T"]:
    """Return the sum over S of generalised terms; for the reverse KL sum_S p log(p/q) - p + q."""
    return jnp.where(valid, divergence(log_p, log_q), 0.0).sum(axis=-1)


def tail_bucket(
    divergence: Divergence, log_p: Few, log_q: Few, valid: Bool[Array, "B T S"]
) -> Float32[Array, "B T"]:
    """Return the divergence over S and one bucket for the rest: a lower bound of the full one."""

    def rest(log_x: Few) -> Float32[Array, "B T"]:
        held = jnp.minimum(logsumexp(log_x, axis=-1), FULL)
        return jnp.log(-jnp.expm1(held))

    inside = score_form(divergence, log_p, log_q, valid)
    return inside + divergence(rest(log_p), rest(log_q))


def tail_sample(
    log_p: Few,
    log_q: Few,
    valid: Bool[Array, "B T S"],
    logprob: Float32[Array, "B T"],
    old_logprob: Float32[Array, "B T"],
    teacher_logprob: Float32[Array, "B T"],
    outside: Bool[Array, "B T"],
) -> Float32[Array, "B T"]:
    """Return sum_S p rho + [y outside S] (r (rho(y) + 1) - 1), r = p(y) / p_old(y), rho = log p/q.

    With y ~ p_old, value and gradient are unbiased for the reverse KL; the tail term's gradient is
    (rho + 1) grad log p at r = 1.
    """
    inside = jnp.where(valid, jnp.exp(log_p) * (log_p - log_q), 0.0).sum(axis=-1)
    rho = stop_gradient(logprob - teacher_logprob)
    tail = bounded_exp(logprob - old_logprob) * (rho + 1.0) - 1.0
    return inside + jnp.where(outside, tail, 0.0)


def forward_kl(
    log_p: Few, log_q: Few, valid: Bool[Array, "B T S"], normalise: bool = False
) -> Float32[Array, "B T"]:
    """Return sum_S q (log q - log p), with q / Z_q for q if `normalise`; may be negative."""
    if normalise:
        log_q = log_q - logsumexp(log_q, axis=-1, keepdims=True)
    return jnp.where(valid, jnp.exp(log_q) * (log_q - log_p), 0.0).sum(axis=-1)


def _support(batch: Batch) -> Support:
    support = batch.scores.support
    if support is None:
        raise ValueError("this loss needs a support: expected method.score.kind=top_k")
    return support


def on_support(student: TokenStats, batch: Batch) -> tuple[Array, Array, Array]:
    """Return log p, log q, both finite everywhere, and the mask of the slots in use: [B, T, S]."""
    support = _support(batch)
    if student.support is None:
        raise ValueError("student statistics lack the support's log-probabilities")
    valid = jnp.asarray(batch.rollout.mask)[..., None] & (jnp.asarray(support.ids) >= 0)
    log_p = live(student.support, batch)
    log_q = stop_gradient(jnp.asarray(support.teacher))
    log_p, log_q = (jnp.where(valid, jnp.maximum(x, NOTHING), NOTHING) for x in (log_p, log_q))
    return log_p, log_q, valid


def _sampled(student: TokenStats, batch: Batch) -> tuple[Array, Array, Array]:
    """Return log p(y), log p_old(y) and log q(y), 0 where masked."""
    values = (
        live(student.logprob, batch),
        stop_gradient(batch.scores.student.logprob),
        stop_gradient(batch.scores.teacher_stats.logprob),
    )
    logprob, old, teacher = (jnp.where(batch.rollout.mask, value, 0.0) for value in values)
    return logprob, old, teacher
