"""The expected results of a stage: dispatch from its configuration to the NumPy reference.

This module has no formulas. The stages are in `losses`, `filtering`, `reweighting` and `ops`; the
references are in `reference`, `reference_batch`, `reference_stages` and `reference_losses`.
"""

import functools
from typing import Any

import jax
import numpy as np

from fireopd_jax.method.filtering import (
    AllOf,
    GapBound,
    HardTokens,
    KeepAll,
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
from fireopd_jax.method.reweighting import (
    ConfidenceConfusion,
    Progressive,
    SoftTrajectories,
    Uniform,
)
from fireopd_jax.ops.formulas import (
    AdaptiveKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
)
from fireopd_jax.verify import reference, reference_batch, reference_losses, reference_stages
from fireopd_jax.verify.reference_losses import Seen

Values = tuple[np.ndarray, np.ndarray]
"""Loss [B, T] and its gradient to the student's logits [B, T, V]."""


def divergence(config: Any) -> Any:
    """Return a divergence's reference: (student's, teacher's logits) -> (value, gradient)."""
    if isinstance(config, ReverseKL):
        return reference.reverse_kl
    if isinstance(config, ForwardKL):
        return reference.forward_kl
    if isinstance(config, JensenShannon):
        return functools.partial(reference.jensen_shannon, beta=config.beta)
    if isinstance(config, SkewedForwardKL):
        return functools.partial(reference.skewed_forward_kl, alpha=config.alpha)
    if isinstance(config, SkewedReverseKL):
        return functools.partial(reference.skewed_reverse_kl, alpha=config.alpha)
    if isinstance(config, AdaptiveKL):
        return functools.partial(reference.adaptive_kl, mu=config.mu)
    raise ValueError(f"no reference of the divergence {config}")


def loss(config: Any, seen: Seen, shift: np.ndarray | None = None) -> Values:
    """Compute the reference of a loss; `shift` [B] is added to advantages (Uni-OPD's margin)."""
    if isinstance(config, SampledReverseKL):
        advantage = reference_losses.advantages(
            seen,
            config.extrapolation,
            config.baseline == "exact_kl",
            config.floor,
            config.ceiling,
            config.gamma,
            shift if config.margin else None,
        )
        return reference_losses.policy_gradient(seen, advantage, config.clip, config.importance_cap)
    if isinstance(config, SampledSquare):
        return reference_losses.squares(seen, config.importance_cap)
    if isinstance(config, SampledPower):
        advantage = reference_losses.powers(seen, config.alpha, config.normalise)
        return reference_losses.policy_gradient(seen, advantage, config.clip)
    if isinstance(config, SelfAdaptation):
        return reference_losses.self_adaptation(
            seen, config.advantage, config.entropy_slope, config.clip
        )
    if isinstance(config, SupportDivergence):
        return bounded(config, on_support(config, seen))
    if isinstance(config, SupportPolicyGradient):
        formula = functools.partial(reference.weighted_score, weight=config.weight)
        return reference_losses.over_support(seen, formula)
    if isinstance(config, EntropyAware):
        return reference_losses.entropy_aware(
            seen, config.alpha, config.tau, config.normalise, config.clip
        )
    if isinstance(config, VocabularyDivergence):
        formula = clipped(config) or divergence(config.divergence)
        return bounded(config, reference_losses.over_vocabulary(seen, formula))
    if isinstance(config, MiniLLM):
        return reference_losses.minillm(seen, config.clip)
    if isinstance(config, ChunkPolicyGradient):
        baseline = config.baseline == "leave_one_out"
        return reference_losses.chunk_policy_gradient(seen, config.beta, baseline)
    raise ValueError(f"no reference of the loss {config}")


def clipped(config: Any) -> Any:
    """Return the reference of a loss's divergence with clipped terms; None without a clip."""
    if config.pointwise_clip is None:
        return None
    divergence = config.divergence
    share = getattr(divergence, "beta", getattr(divergence, "alpha", 0.0))
    return functools.partial(
        reference.clipped, kind=divergence.kind, limit=config.pointwise_clip, share=share
    )


def bounded(config: Any, values: Values) -> Values:
    """Return the values and gradients with a loss's bound of the value at a token."""
    clip = config.token_clip
    return values if clip is None else reference_losses.at_most(values, clip)


def on_support(config: SupportDivergence, seen: Seen) -> Values:
    """Compute the reference of a divergence on a support."""
    if config.head == "tail_sample":
        return reference_losses.tail_sample(seen)
    if config.head == "renormalised":
        formula: Any = functools.partial(
            reference.renormalised, divergence=clipped(config) or divergence(config.divergence)
        )
    elif config.head == "tail_bucket":
        formula = functools.partial(reference.tail_bucket, divergence=divergence(config.divergence))
    elif isinstance(config.divergence, ReverseKL):
        formula = reference.score_form
    elif isinstance(config.divergence, ForwardKL):
        formula = reference.score_form_of_forward_kl
    else:
        formula = functools.partial(
            reference.score_form_of_jensen_shannon, beta=config.divergence.beta
        )
    return reference_losses.over_support(seen, formula)


def keep(config: Any, stats: dict[str, np.ndarray], mask: np.ndarray, **of_batch: Any) -> Any:
    """Compute the reference of a filter: bool [B] for rows, or [B, T] for tokens.

    `stats` are log-probabilities, entropies and the exact reverse KL, [B, T] each; `of_batch` may
    have the fields of `Rows`, and `gap` [B].
    """
    log_q, log_p = stats["teacher_logprob"], stats["student_logprob"]
    if isinstance(config, KeepAll):
        return mask.any(axis=1)
    if isinstance(config, TeacherQuantile):
        score = log_q - log_p if config.score == "student_relative" else log_q
        if config.window:
            recent = of_batch["recent"][..., 0]
            earlier = recent[~np.isnan(recent)]
            return reference_stages.windowed(score, mask, config.drop_fraction, earlier)
        groups = of_batch.get("teacher") if config.scope == "teacher" else None
        return reference_batch.keep_rows(score, mask, config.drop_fraction, groups)
    if isinstance(config, RandomDrop):
        key = jax.random.key(config.seed, impl="threefry2x32")
        lots = [
            float(jax.random.uniform(jax.random.fold_in(key, i))) for i in of_batch["sample_id"]
        ]
        score = np.broadcast_to(np.array(lots)[:, None], mask.shape)
        return reference_batch.keep_rows(score, mask, config.drop_fraction)
    if isinstance(config, LengthDrop):
        return reference_stages.lengths(mask, config.drop_fraction, config.drop == "longest")
    if isinstance(config, Tip):
        entropy, kl = stats["student_entropy"], stats["reverse_kl"]
        return reference_stages.tip(entropy, kl, mask, config.keep_fraction)
    if isinstance(config, LeastLikely):
        return reference_stages.least_likely(log_p, mask, config.keep_fraction)
    if isinstance(config, HardTokens):
        pair = stats["teacher_entropy"], stats["student_entropy"]
        options = config.keep_fraction, config.alpha, config.beta
        return reference_stages.hard_tokens(*pair, mask, *options)
    if isinstance(config, Prefix):
        return reference_stages.prefix(log_q, log_p, mask, config.window, config.least)
    if isinstance(config, RepetitionGuard):
        rate = reference_stages.repetition(of_batch["tokens"], mask, config.ngram)
        return mask.any(axis=1) & (rate <= config.limit)
    if isinstance(config, SpecialTokens):
        ids = of_batch["special"], () if config.stop else of_batch["stop"]
        bound = np.inf if config.log_ratio is None else config.log_ratio
        tokens = of_batch["tokens"]
        return reference_stages.special(tokens, log_q, log_p, mask, *ids, bound, config.least)
    if isinstance(config, GapBound):
        return mask.any(axis=1) & (np.abs(of_batch["gap"]) <= config.largest)
    if isinstance(config, AllOf):
        for each in config.filters:
            kept = keep(each, stats, mask, **of_batch)
            mask = mask & (kept if kept.ndim == 2 else kept[:, None])
        return mask
    if isinstance(config, Reopold):
        return reference_batch.keep_tokens(
            stats["teacher_logprob"],
            stats["student_logprob"],
            stats["student_entropy"],
            mask,
            of_batch.get("progress", 0.0),
            floor=config.floor,
            entropy_fraction=config.entropy_fraction,
            switch=config.switch,
        )
    raise ValueError(f"no reference of the filter {config}")


def weight(
    config: Any, stats: dict[str, np.ndarray], mask: np.ndarray, kept: Any, **of_batch: Any
) -> Any:
    """Compute the reference of the weights; `of_batch` may have `teacher` and `vocab_size`."""
    if isinstance(config, Uniform):
        return mask.astype(float)
    if isinstance(config, ConfidenceConfusion):
        return reference_batch.weights(
            stats["teacher_entropy"],
            stats["student_entropy"],
            mask,
            kept,
            config.alpha,
            config.beta,
            config.max_scope,
            quantile=config.max_quantile,
            **of_batch,
        )
    if isinstance(config, Progressive):
        return reference_batch.progressive(
            stats["teacher_logprob"], stats["student_logprob"], mask, config.gamma
        )
    if isinstance(config, SoftTrajectories):
        rows = reference_stages.soft_trajectories(
            stats["teacher_logprob"], mask, config.temperature
        )
        return rows * weight(config.tokens, stats, mask, kept, **of_batch)
    raise ValueError(f"no reference of the weighting {config}")
