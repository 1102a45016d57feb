"""Compare every loss and option with the NumPy reference: values, gradients to states and head.

states, heads -> token statistics -> loss -> gradient                     package, jitted, float32
logits -> reference -> gradient to logits -> gradient to states and head  NumPy, float64
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.method.batch import total_loss
from fireopd_jax.method.losses.base import ExactDivergence
from fireopd_jax.method.losses.chunks import ChunkPolicyGradient
from fireopd_jax.method.losses.sampled_token import SampledPower, SampledReverseKL, SampledSquare
from fireopd_jax.method.losses.self_adaptation import SelfAdaptation
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.method.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.method.scoring.supports import Kind
from fireopd_jax.ops.divergence import head_divergence
from fireopd_jax.ops.formulas import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from fireopd_jax.ops.head import head_gather
from fireopd_jax.types import Array, Batch, Rollout, TokenStats
from fireopd_jax.verify import cases, expected
from fireopd_jax.verify.cases import HEAD, SCALE, States
from fireopd_jax.verify.pool import compiled, in_parallel
from fireopd_jax.verify.reference_batch import coefficients
from fireopd_jax.verify.table import Row, absolute, relative

VALUE_BOUND, GRADIENT_BOUND = 1e-5, 1e-5
"""Relative to the largest value and gradient element; float32 rounds at 6e-8, long sums worse."""
NOTHING = 1e-6
"""Bound for values and gradients that must be zero; typical ones are of order 1."""

FEW = (ReverseKL(), ForwardKL(), JensenShannon(beta=0.3))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and the case that it is verified on."""

    loss: Any
    support: Kind = "teacher"
    sampled: bool = False
    later: bool = False
    """The student was updated after scoring: the ratio is not 1, and is clipped at some tokens."""
    vanishes: bool = True
    """Loss and gradient are zero if the student equals the teacher."""

    @property
    def name(self) -> str:
        """The kind, and every option that is not the default."""
        parts = [describe(self.loss)]
        if self.support != "teacher" or self.sampled:
            parts.append(f"on {self.support}" + (" + sampled" if self.sampled else ""))
        return ", ".join(parts + (["an update later"] if self.later else []))


def describe(config: Any) -> str:
    """Return a configuration as text: its kind, and the fields that are not the default."""
    parts = [config.kind]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "kind" or value == field.default:
            continue
        parts.append(f"{field.name}={describe(value) if hasattr(value, 'kind') else value}")
    return " ".join(parts)


OBJECTIVES: tuple[Objective, ...] = (
    Objective(SampledReverseKL()),
    Objective(SampledReverseKL(), later=True),
    Objective(SampledReverseKL(clip=0.05, importance_cap=1.5), later=True),
    # Above 1 the optimum is not the teacher.
    Objective(SampledReverseKL(extrapolation=1.25), vanishes=False),
    Objective(SampledReverseKL(floor=-1.0, ceiling=0.5)),
    Objective(SampledReverseKL(baseline="exact_kl")),
    Objective(SampledReverseKL(gamma=0.5)),
    Objective(SampledReverseKL(gamma=1.0)),
    Objective(SampledSquare()),
    Objective(SampledSquare(importance_cap=1.5), later=True),
    # Of a vocabulary of 320 the fifth power of a sampled token's probability is nearly 0.
    Objective(SampledPower(alpha=0.5), later=True),
    Objective(SampledPower(alpha=1.0)),
    Objective(SampledPower(alpha=0.1, normalise=True)),
    Objective(SampledPower(alpha=0.0, normalise=True)),
    # There is no teacher to agree with.
    Objective(SelfAdaptation(), vanishes=False),
    Objective(SelfAdaptation(advantage=-0.5, entropy_slope=0.0), later=True, vanishes=False),
    Objective(SelfAdaptation(entropy_slope=-1.0, clip=0.05), later=True, vanishes=False),
    *(
        Objective(SupportDivergence(head=head, divergence=divergence))
        for head in ("renormalised", "score", "tail_bucket")
        for divergence in FEW
    ),
    Objective(SupportDivergence(), "union", sampled=True),
    Objective(SupportDivergence(head="tail_bucket"), "student"),
    Objective(SupportDivergence(head="score"), "intersection", sampled=True),
    # Zero in the mean over sampled tokens, not for each token.
    Objective(SupportDivergence(head="tail_sample"), vanishes=False),
    Objective(SupportDivergence(head="tail_sample"), later=True, vanishes=False),
    *(
        Objective(SupportDivergence(divergence=divergence, pointwise_clip=0.05))
        for divergence in FEW
    ),
    Objective(SupportDivergence(head="tail_bucket", token_clip=0.3)),
    Objective(SupportPolicyGradient(weight="student")),
    Objective(SupportPolicyGradient(weight="teacher")),
    Objective(SupportPolicyGradient(weight="none")),
    # Forward KL on a support drives the mass of the support to 1.
    Objective(EntropyAware(tau=4.2), later=True, vanishes=False),
    Objective(EntropyAware(alpha=0.5, tau=0.0, normalise=True), vanishes=False),
    *(
        Objective(VocabularyDivergence(divergence=divergence))
        for divergence in (
            ReverseKL(),
            ForwardKL(),
            JensenShannon(),
            JensenShannon(beta=0.1),
            JensenShannon(beta=0.0),
            JensenShannon(beta=1.0),
            SkewedForwardKL(),
            SkewedReverseKL(),
            AdaptiveKL(),
        )
    ),
    *(
        Objective(VocabularyDivergence(divergence=divergence, pointwise_clip=0.01))
        for divergence in (*FEW, SkewedForwardKL(), SkewedReverseKL())
    ),
    Objective(VocabularyDivergence(divergence=ForwardKL(), token_clip=1.0)),
    Objective(MiniLLM()),
    Objective(MiniLLM(), later=True),
    # Its teacher is text; the optimum is what that teacher writes.
    Objective(ChunkPolicyGradient(), vanishes=False),
    Objective(ChunkPolicyGradient(beta=2.0, baseline="leave_one_out"), later=True, vanishes=False),
)


class Programs:
    """Compiled programs: one per shape of support, divergence and loss."""

    def __init__(self):
        self.score = compiled(cases.score, 2, 3)
        self._read = compiled(read_heads, 0)
        self._pull = compiled(pull_back, 0)
        self._differentiate = compiled(differentiate, 0)

    def run(self, loss: Any, states: States, batch: Batch) -> tuple[Array, tuple[Array, Array]]:
        """Return the loss [B, T], and its weighted sum's gradients to states and head."""
        exact, own = loss.exact_divergence, (states.hidden, states.head)
        student = self._read(exact, own, states, batch)
        to_student, value = self._differentiate(loss, student, batch)
        return value, self._pull(exact, own, states, batch, to_student)


def read_heads(
    exact: ExactDivergence | None, own: tuple[Array, Array], states: States, batch: Batch
) -> TokenStats:
    """Compute the student's token statistics from states and head, as the update does."""
    support = batch.scores.support
    assert support is not None
    tokens = jnp.asarray(batch.rollout.tokens)
    stats = head_gather(*own, tokens, jnp.asarray(support.ids), **HEAD)
    whole = None
    if exact is not None:
        judges = {
            "teacher": (states.teacher_hidden, states.teacher_head),
            "base": (states.base, states.head),
        }
        whole = head_divergence(
            exact.divergence,
            *own,
            *judges[exact.judge],
            logit_scale=SCALE,
            chunk=HEAD.get("chunk"),
        )
    return TokenStats(stats.logprob, stats.entropy, stats.support_logprob, whole)


def pull_back(
    exact: ExactDivergence | None,
    own: tuple[Array, Array],
    states: States,
    batch: Batch,
    cotangent: TokenStats,
) -> tuple[Array, Array]:
    """Backpropagate a gradient from the token statistics to states and head."""
    return jax.vjp(lambda own: read_heads(exact, own, states, batch), own)[1](cotangent)[0]


def differentiate(loss: Any, student: TokenStats, batch: Batch) -> tuple[TokenStats, Array]:
    """Return the weighted sum's gradient to the token statistics, and the loss [B, T]."""

    def total(student: TokenStats) -> tuple[Array, Array]:
        each = loss(student, batch)
        return total_loss(each, batch), each

    return jax.grad(total, has_aux=True)(student)


def rows(objectives: Sequence[Objective] = OBJECTIVES) -> Iterator[Row]:
    """Verify each objective: value, gradient, and both at zero if the models are equal."""
    programs, rollout = Programs(), cases.dummy_rollout()

    def of(objective: Objective) -> Iterator[Row]:
        yield from against_reference(objective, programs, rollout)
        if objective.vanishes and not objective.later:
            yield from teacher_is_student(objective, programs, rollout)

    yield from in_parallel(of, objectives)


def make_batch(states: States, rollout: Rollout, objective: Objective, programs: Programs) -> Batch:
    """Score the case and return a batch; random weights, so that all tokens count differently."""
    scores = programs.score(states, rollout, objective.support, objective.sampled)
    mask = np.asarray(rollout.mask)
    weight = np.random.default_rng(4).uniform(0.5, 1.5, mask.shape) * mask
    share = coefficients(mask, mask.any(axis=1), "token")
    return Batch(rollout, scores, jnp.float32(weight), jnp.float32(share))


def against_reference(objective: Objective, programs: Programs, rollout: Rollout) -> Iterator[Row]:
    """Compare value and gradient with the reference, on two different models."""
    states = cases.make_states(later=objective.later)
    batch = make_batch(states, rollout, objective, programs)
    value, (d_hidden, d_head) = programs.run(objective.loss, states, batch)
    exact, d_z = expected.loss(objective.loss, cases.see(states, rollout, batch.scores))
    share = np.asarray(batch.weight, np.float64) * np.asarray(batch.coefficient, np.float64)
    d_z = SCALE * share[..., None] * d_z
    hidden, head = (np.asarray(x, np.float64) for x in (states.hidden, states.head))
    gradients = [(d_hidden, d_z @ head), (d_head, np.einsum("btv,btd->vd", d_z, hidden))]
    yield relative(f"{objective.name}: value", [(value, exact)], VALUE_BOUND)
    yield relative(f"{objective.name}: gradient", gradients, GRADIENT_BOUND)


def teacher_is_student(objective: Objective, programs: Programs, rollout: Rollout) -> Iterator[Row]:
    """Compare value and gradient with zero, on two equal models."""
    states = cases.make_states(equal=True)
    batch = make_batch(states, rollout, objective, programs)
    value, gradient = programs.run(objective.loss, states, batch)
    zeros = [(x, np.zeros(x.shape)) for x in (value, *gradient)]
    yield absolute(f"{objective.name}: zero at the teacher", zeros, NOTHING)
