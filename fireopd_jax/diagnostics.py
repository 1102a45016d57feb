"""What a batch says of the method: each statistic is defined here, once, as a mergeable sum.

    Batch, keep -> {name: Mean or Max}

Names follow what users of other tools know. Entropies and log-probs are in nats, over the response
tokens of all valid rows unless a name says otherwise.
"""

import jax.numpy as jnp

from fireopd_jax.batch import Keep
from fireopd_jax.metrics import Max, Mean
from fireopd_jax.types import Batch


def of_batch(batch: Batch, keep: Keep, room: int) -> dict[str, Mean | Max]:
    """Describe rollouts, scores and weights; `room` is the longest response there was space for."""
    rollout, scores = batch.rollout, batch.scores
    mask, keep = jnp.asarray(rollout.mask), jnp.asarray(keep)
    valid = mask.any(axis=1)
    length = mask.sum(axis=1)
    kept = keep if keep.ndim == 1 else keep.any(axis=1)
    counted = batch.coefficient > 0
    log_ratio = scores.student.logprob - scores.teacher.logprob
    score = jnp.where(mask, scores.teacher.logprob, 0).sum(axis=1) / jnp.maximum(length, 1)
    unfinished = ~rollout.finished
    weight = batch.weight
    return _of_support(batch) | {
        "num_tokens": Mean(length.sum().astype(jnp.float32), jnp.float32(1)),
        "completions/mean_length": Mean.of(length, valid),
        "completions/max_length": Max.of(length, valid),
        "completions/clipped_ratio": Mean.of(unfinished, valid),
        "completions/filled_fraction": Mean.of(length / room, valid),
        "distill/reverse_kl": Mean.of(log_ratio, mask),
        "distill/advantage_positive_fraction": Mean.of(log_ratio < 0, mask),
        "distill/log_ratio_max": Max.of(jnp.abs(log_ratio), mask),
        # Tokens that one model would never write: mostly of another template or tokenizer.
        "distill/log_ratio_above_10": Mean.of(jnp.abs(log_ratio) > 10, mask),
        "distill/entropy_gap": Mean.of(
            jnp.abs(scores.teacher.entropy - scores.student.entropy), mask
        ),
        "teacher_logprob": Mean.of(scores.teacher.logprob, mask),
        "teacher_entropy": Mean.of(scores.teacher.entropy, mask),
        "teacher_entropy_max": Max.of(scores.teacher.entropy, mask),
        "student_entropy": Mean.of(scores.student.entropy, mask),
        "student_entropy_max": Max.of(scores.student.entropy, mask),
        "fire/keep_fraction": Mean.of(kept, valid),
        "fire/kept_tokens": Mean(counted.sum().astype(jnp.float32), jnp.float32(1)),
        "fire/score_kept": Mean.of(score, valid & kept),
        "fire/score_dropped": Mean.of(score, valid & ~kept),
        "fire/dropped_clipped_ratio": Mean.of(unfinished, valid & ~kept),
        "fire/token_weight_mean": Mean.of(weight, counted),
        "fire/token_weight_max": Max.of(weight, counted),
        "fire/token_weight_square": Mean.of(weight**2, counted),
        "sampler/logprob_gap": Mean.of(jnp.abs(scores.student.logprob - rollout.logprob), mask),
    }


def _of_support(batch: Batch) -> dict[str, Mean | Max]:
    """Describe the support, and how far the two lists of probable words agree, where scored.

    References: arXiv 2604.13016, Eq. 6, 7, 9 and 10.
    """
    scores, mask = batch.scores, jnp.asarray(batch.rollout.mask)
    out: dict[str, Mean | Max] = {}
    if scores.overlap is not None:
        out |= {
            "distill/overlap_ratio": Mean.of(scores.overlap.ratio, mask),
            "distill/overlap_mass_student": Mean.of(scores.overlap.student_mass, mask),
            "distill/overlap_mass_teacher": Mean.of(scores.overlap.teacher_mass, mask),
            "distill/overlap_advantage": Mean.of(scores.overlap.advantage, mask),
        }
    if scores.support is not None:
        ids = jnp.asarray(scores.support.ids)
        inside = (ids == jnp.asarray(batch.rollout.tokens)[..., None]).any(axis=-1)
        held = jnp.where(ids >= 0, jnp.exp(jnp.asarray(scores.support.teacher)), 0.0).sum(axis=-1)
        out["distill/in_support_fraction"] = Mean.of(inside, mask)
        out["distill/support_mass_teacher"] = Mean.of(held, mask)
    return out
