"""Every option of every variant of a stage changes the output of the stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.method.batch import coefficients
from fireopd_jax.method.filtering import (
    AllOf,
    GapBound,
    HardTokens,
    LeastLikely,
    LengthDrop,
    Prefix,
    RandomDrop,
    Reopold,
    RepetitionGuard,
    SpecialTokens,
    TeacherQuantile,
    Tip,
)
from fireopd_jax.method.losses.chunks import ChunkPolicyGradient
from fireopd_jax.method.losses.sampled_token import SampledPower, SampledReverseKL, SampledSquare
from fireopd_jax.method.losses.self_adaptation import SelfAdaptation
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.method.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.method.reweighting import ConfidenceConfusion, Progressive, SoftTrajectories
from fireopd_jax.method.scoring.outcomes import OutcomeMargin
from fireopd_jax.ops.formulas import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    SkewedForwardKL,
    SkewedReverseKL,
)
from fireopd_jax.recipe.schema import MethodConfig
from fireopd_jax.types import Batch, Chunks, Margin, Scores, StageContext, Support, TokenStats
from tests import cases
from tests.recipe.annotations import members


def of_loss(loss):
    """Value and gradient of a batch in which every option has an effect."""
    rng = np.random.default_rng(0)
    shape = (3, 5)
    mask = np.arange(5)[None] < np.array([5, 3, 4])[:, None]

    def draw(*shape, scale=1.0):
        return jnp.asarray(-rng.exponential(scale, shape), jnp.float32)

    stats = [TokenStats(draw(*shape), -draw(*shape)) for _ in range(3)]
    ids = jnp.asarray(np.tile([[[0, 1, 2]]], (*shape, 1)), jnp.int32)
    margin = Margin(-draw(3), jnp.zeros(3))
    chunks = Chunks(np.arange(5)[None] < np.array([2, 3, 0])[:, None], -draw(*shape), -draw(*shape),
                    -draw(3))  # fmt: skip
    support = Support(ids, draw(*shape, 3) - 1.0)
    scores = Scores(*stats, support=support, margin=margin, chunks=chunks)
    rollout = cases.make_rollout(mask, logprob=stats[0].logprob + 0.7)
    object.__setattr__(rollout, "tokens", rng.integers(0, 6, shape).astype(np.int32))
    keep = mask.any(axis=1)
    batch = Batch(rollout, scores, jnp.ones(shape), coefficients(mask, keep, "seq"))
    moved = stats[0].logprob + jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
    student = TokenStats(moved, stats[0].entropy, draw(*shape, 3) - 1.0, -draw(*shape))

    def total(student):
        value = loss(student, batch)
        return value.sum(), value

    gradient, value = jax.jit(jax.grad(total, has_aux=True))(student)
    return [value, *jax.tree.leaves(gradient)]


def of_divergence(divergence):
    log_p, log_q = (
        jax.nn.log_softmax(jnp.asarray(z, jnp.float32))
        for z in np.random.default_rng(0).normal(size=(2, 7))
    )
    if divergence.adaptive:
        return [log_q >= divergence.head_threshold(log_q[None])[0]]
    return [divergence(log_p, log_q)]


def of_filter(progress):
    def run(stage):
        scores, mask, teacher = cases.random_case(4, rows=9)
        rng = np.random.default_rng(0)
        margin = Margin(np.zeros(9, np.float32), np.full(9, 5.0, np.float32))
        kl = rng.exponential(1.0, mask.shape).astype(np.float32)
        scores = dataclasses.replace(scores, margin=margin, reverse_kl=kl)
        context = StageContext(
            mask,
            teacher,
            2,
            tokens=rng.integers(0, 3, mask.shape).astype(np.int32),
            sample_id=np.arange(9, dtype=np.int32),
            progress=progress,
            special=(),
            stop=(2,),
        )
        recent = np.float32([-1, 0]) * rng.exponential(0.3, (2, 9, 1)).astype(np.float32)
        state = recent if jax.tree.leaves(stage.init(9)) else ()
        keep, _ = stage(scores, context, state)
        return [np.broadcast_to(np.asarray(keep).T, mask.T.shape)]

    return run


def of_outcome(stage):
    scores, mask, _ = cases.random_case(0)
    rollout = cases.make_rollout(mask)
    group = np.zeros(len(mask), np.int32)
    prompts = dataclasses.replace(rollout.prompts, group=group)
    correct = (np.arange(len(mask)) % 2).astype(np.float32)
    rollout = dataclasses.replace(rollout, prompts=prompts, correct=correct)
    return [stage(scores, rollout).margin.shift]


def of_weight(stage):
    scores, mask, teacher = cases.random_case(0)
    return [stage.weight(scores, StageContext(mask, teacher, 2), mask.any(axis=1))]


CHANGES = [
    (of_loss, SampledReverseKL(), "clip", 0.01),
    (of_loss, SampledReverseKL(), "importance_cap", 0.3),
    (of_loss, SampledReverseKL(), "extrapolation", 1.25),
    (of_loss, SampledReverseKL(), "floor", -0.2),
    (of_loss, SampledReverseKL(), "ceiling", 0.2),
    (of_loss, SampledReverseKL(), "baseline", "exact_kl"),
    (of_loss, SampledReverseKL(), "gamma", 0.5),
    (of_loss, SampledSquare(), "importance_cap", 0.3),
    (of_loss, SampledPower(), "alpha", 0.5),
    (of_loss, SampledPower(), "normalise", True),
    (of_loss, SampledPower(), "clip", 0.01),
    (of_loss, SelfAdaptation(), "advantage", -0.5),
    (of_loss, SelfAdaptation(), "entropy_slope", 0.0),
    (of_loss, SelfAdaptation(), "clip", 0.01),
    (of_loss, VocabularyDivergence(), "token_clip", 0.1),
    (of_loss, SupportDivergence(), "pointwise_clip", 0.01),
    (of_loss, SupportDivergence(), "token_clip", 0.01),
    (of_loss, SupportDivergence(), "head", "score"),
    (of_loss, SupportDivergence(), "divergence", ForwardKL()),
    (of_loss, SupportPolicyGradient(), "weight", "none"),
    (of_loss, EntropyAware(), "alpha", 0.5),
    (of_loss, EntropyAware(), "tau", 5.0),
    (of_loss, EntropyAware(), "normalise", True),
    (of_loss, EntropyAware(), "clip", 0.01),
    (of_loss, MiniLLM(), "clip", 0.01),
    (of_loss, ChunkPolicyGradient(), "beta", 0.2),
    (of_loss, ChunkPolicyGradient(), "baseline", "leave_one_out"),
    (of_divergence, JensenShannon(), "beta", 0.2),
    (of_divergence, SkewedForwardKL(), "alpha", 0.3),
    (of_divergence, SkewedReverseKL(), "alpha", 0.3),
    (of_divergence, AdaptiveKL(), "mu", 0.9),
    (of_filter(0.0), Reopold(), "floor", 0.9),
    (of_filter(0.9), Reopold(), "entropy_fraction", 0.7),
    (of_filter(0.3), Reopold(), "switch", 0.2),
    (of_filter(0.0), TeacherQuantile(), "drop_fraction", 0.6),
    (of_filter(0.0), TeacherQuantile(drop_fraction=0.5), "scope", "teacher"),
    (of_filter(0.0), TeacherQuantile(drop_fraction=0.5), "score", "student_relative"),
    (of_filter(0.0), TeacherQuantile(), "window", 2),
    (of_filter(0.0), RandomDrop(), "drop_fraction", 0.7),
    (of_filter(0.0), RandomDrop(drop_fraction=0.5), "seed", 1),
    (of_filter(0.0), LengthDrop(), "drop_fraction", 0.7),
    (of_filter(0.0), LengthDrop(), "drop", "shortest"),
    (of_filter(0.0), Tip(), "keep_fraction", 0.2),
    (of_filter(0.0), HardTokens(), "keep_fraction", 0.2),
    (of_filter(0.0), HardTokens(), "alpha", 9.0),
    (of_filter(0.0), HardTokens(), "beta", 9.0),
    (of_filter(0.0), LeastLikely(), "keep_fraction", 0.7),
    (of_filter(0.0), RepetitionGuard(ngram=1, limit=0.1), "ngram", 6),
    (of_filter(0.0), RepetitionGuard(ngram=1, limit=0.1), "limit", 0.9),
    (of_filter(0.0), Prefix(least=-0.5), "window", 1),
    (of_filter(0.0), Prefix(), "least", 0.0),
    (of_filter(0.0), SpecialTokens(log_ratio=0.5, least=1), "log_ratio", 2.0),
    (of_filter(0.0), SpecialTokens(log_ratio=0.5, least=1), "least", 99),
    (of_filter(0.0), SpecialTokens(log_ratio=0.1, least=1), "stop", True),
    (of_filter(0.0), GapBound(), "largest", 1.0),
    (of_filter(0.0), AllOf(), "filters", (LengthDrop(drop_fraction=0.5),)),
    (of_weight, Progressive(), "gamma", 2.0),
    (of_weight, ConfidenceConfusion(), "alpha", 2.0),
    (of_weight, ConfidenceConfusion(), "beta", 2.0),
    (of_weight, ConfidenceConfusion(), "max_scope", "row"),
    (of_weight, ConfidenceConfusion(), "max_quantile", 0.5),
    (of_weight, SoftTrajectories(), "temperature", 0.3),
    (of_weight, SoftTrajectories(), "tokens", Progressive()),
    (of_loss, SampledReverseKL(), "margin", True),
    (of_outcome, OutcomeMargin(), "delta", 2.0),
]


def test_every_option_changes_something():
    for run, stage, name, value in CHANGES:
        assert getattr(stage, name) != value
        other = dataclasses.replace(stage, **{name: value})
        before, after = run(stage), run(other)
        pairs = zip(before, after, strict=True)
        changed = any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)
        assert changed, f"{type(stage).__name__}.{name}"


def test_every_option_of_the_stages_is_tried():
    tried = {(type(stage), name) for _, stage, name, _ in CHANGES}
    # What the update computes for it: the divergences are compared in tests/ops/test_divergence.py.
    tried |= {(VocabularyDivergence, "divergence"), (VocabularyDivergence, "pointwise_clip")}
    # Named texts are turned into ids by the build: tests/method/filtering/test_tokens.py.
    tried |= {(SpecialTokens, "strings")}
    for section in ("loss", "filter", "reweight"):
        for variant in members(MethodConfig.__dataclass_fields__[section].type):
            for field in dataclasses.fields(variant):
                assert field.name == "kind" or (variant, field.name) in tried, (variant, field.name)
