"""What a batch says of the method: each statistic is defined here, once, as a mergeable sum.

    Batch, keep -> {name: Mean or Max}

Names follow what users of other tools know. Entropies and log-probs are in nats, over the response
tokens of all valid rows unless a name says otherwise.
"""

from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp

from fireopd_jax.method.batch import Keep
from fireopd_jax.method.filtering import AllOf
from fireopd_jax.metrics import Max, Mean
from fireopd_jax.ops.ranks import (
    masked_quantile,
    masked_quantiles,
    median_by_id,
    repetition_rate,
)
from fireopd_jax.types import Array, Batch, Rows, Scores

FOREIGN, OFTEN = 10.0, 8
"""Nats of |log p/q| above which a model would not write a token, and occurrences that show it."""
NGRAM = 4
"""Tokens of the n-grams whose repetition is counted."""
BINS = 4
"""Parts of the room for a response, of which each has figures of its own."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
TOP = 0.99
"""Quantile from which on an advantage belongs to the top 1 %."""


def of_batch(
    batch: Batch, keep: Keep, room: int, teachers: Sequence[str] = ()
) -> dict[str, Mean | Max]:
    """Describe rollouts, scores and weights.

    `room` is the longest response there was space for; `teachers` are named where there are
    several.
    """
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
    own = mask & (jnp.asarray(rollout.version) >= 0)
    drift = scores.student.logprob - rollout.logprob
    by_part = _of_support(batch) | _of_advantages(batch) | _of_positions(batch, room)
    by_part |= _of_grades(batch) | _of_teachers(batch, kept, valid, teachers)
    return by_part | {
        "num_tokens": Mean(length.sum().astype(jnp.float32), jnp.float32(1)),
        "completions/mean_length": Mean.of(length, valid),
        "completions/max_length": Max.of(length, valid),
        "completions/clipped_ratio": Mean.of(unfinished, valid),
        "completions/eos_rate": Mean.of(rollout.finished, valid),
        "completions/empty_rate": Mean.of(~valid),
        "completions/repetition_rate": Mean.of(repetition_rate(rollout.tokens, mask, NGRAM), valid),
        "completions/filled_fraction": Mean.of(length / room, valid),
        "distill/reverse_kl": Mean.of(log_ratio, mask),
        "distill/advantage_positive_fraction": Mean.of(log_ratio < 0, mask),
        "distill/log_ratio_max": Max.of(jnp.abs(log_ratio), mask),
        "distill/log_ratio_above_10": Mean.of(jnp.abs(log_ratio) > FOREIGN, mask),
        "distill/foreign_fraction": _of_foreign(batch),
        "distill/entropy_gap": Mean.of(
            jnp.abs(scores.teacher.entropy - scores.student.entropy), mask
        ),
        "teacher_logprob": Mean.of(scores.teacher.logprob, mask),
        "teacher_entropy": Mean.of(scores.teacher.entropy, mask),
        "teacher_entropy_max": Max.of(scores.teacher.entropy, mask),
        "student_entropy": Mean.of(scores.student.entropy, mask),
        "student_entropy_max": Max.of(scores.student.entropy, mask),
        "fire/keep_fraction": Mean.of(kept, valid),
        "fire/token_keep_fraction": Mean.of(counted, mask),
        "fire/kept_tokens": Mean(counted.sum().astype(jnp.float32), jnp.float32(1)),
        "fire/score_kept": Mean.of(score, valid & kept),
        "fire/score_dropped": Mean.of(score, valid & ~kept),
        "fire/dropped_clipped_ratio": Mean.of(unfinished, valid & ~kept),
        "fire/token_weight_mean": Mean.of(weight, counted),
        "fire/token_weight_max": Max.of(weight, counted),
        "fire/token_weight_square": Mean.of(weight**2, counted),
        # Of the distribution that was drawn from: filters of the sampler show, too.
        "sampler/logprob_gap": Mean.of(jnp.abs(drift), own),
        "sampler/logprob_gap_max": Max.of(jnp.abs(drift), own),
    }


def of_filters(filter: AllOf, scores: Scores, rows: Rows) -> dict[str, Mean | Max]:
    """Tell what share of the tokens that came to each of several filters it has kept.

    A second filter of a kind is `KIND_2`.
    """
    before, seen, out = jnp.asarray(rows.mask), Counter[str](), {}
    for each, after in zip(filter.filters, filter.left(scores, rows), strict=True):
        seen[each.kind] += 1
        name = each.kind if seen[each.kind] == 1 else f"{each.kind}_{seen[each.kind]}"
        out[f"fire/keep_fraction_by_{name}"] = Mean.of(after, before)
        before = after
    return out


def _of_advantages(batch: Batch) -> dict[str, Mean | Max]:
    """Describe A = log pi_T - log pi_S: its spread, and who carries most of it."""
    mask, scores = jnp.asarray(batch.rollout.mask), batch.scores
    advantage = scores.teacher.logprob - scores.student.logprob
    size = jnp.abs(advantage)
    inside = mask & jnp.isfinite(size)
    top = inside & (size >= masked_quantile(size, mask, TOP))
    total, of_top = (jnp.sum(jnp.where(where, size, 0.0)) for where in (inside, top))
    out: dict[str, Mean | Max] = {
        "distill/advantage_square": Mean.of(advantage**2, mask),
        "distill/advantage_max": Max.of(advantage, mask),
        "distill/advantage_top_share": Mean(of_top, total),
    }
    if scores.reverse_kl is not None:
        out["distill/reverse_kl_exact"] = Mean.of(scores.reverse_kl, mask)
    return out


def _of_foreign(batch: Batch) -> Mean:
    """Tell the share of tokens that one model would never write: mostly of another template.

    A mistake of the student's may be as unlikely, but not wherever the same token stands.
    """
    mask, scores = jnp.asarray(batch.rollout.mask).reshape(-1), batch.scores
    size = jnp.abs(scores.teacher.logprob - scores.student.logprob).reshape(-1)
    ids = jnp.asarray(batch.rollout.tokens).reshape(-1)
    median, count = median_by_id(ids, size, mask)
    return Mean.of((median > FOREIGN) & (count >= OFTEN), mask)


def _of_positions(batch: Batch, room: int) -> dict[str, Mean | Max]:
    """Describe each quarter of the room for a response: late tokens go wrong first."""
    mask, scores = jnp.asarray(batch.rollout.mask), batch.scores
    size = jnp.abs(scores.teacher.logprob - scores.student.logprob)
    part = jnp.minimum(jnp.arange(mask.shape[1]) * BINS // room, BINS - 1)
    out: dict[str, Mean | Max] = {}
    for index in range(BINS):
        inside = mask & (part == index)[None]
        here = (inside & jnp.isfinite(size)).any()
        name = f"quarter_{index + 1}"
        out[f"distill/student_entropy_{name}"] = Mean.of(scores.student.entropy, inside)
        quantiles = masked_quantiles(size, inside, tuple(QUANTILES.values()))
        for label, quantile in zip(QUANTILES, quantiles, strict=True):
            value = Mean(jnp.where(here, quantile, 0.0), here.astype(jnp.float32))
            out[f"distill/log_ratio_{label}_{name}"] = value
    return out


def _of_grades(batch: Batch) -> dict[str, Mean | Max]:
    """Describe the grades, where responses were graded."""
    scores, mask = batch.scores, jnp.asarray(batch.rollout.mask)
    if scores.correct is None or scores.margin is None:
        return {}
    valid, group = mask.any(axis=1), jnp.asarray(batch.rollout.prompts.group)
    same = (group[:, None] == group[None]) & valid[None]
    right = jnp.asarray(scores.correct) > 0
    return {
        "completions/correct": Mean.of(right, valid),
        "completions/group_all_correct": Mean.of((~same | right[None]).all(axis=1), valid),
        "distill/margin_gap": Mean.of(scores.margin.gap, valid),
        "distill/margin_shift": Mean.of(jnp.abs(scores.margin.shift), valid),
    }


def _of_teachers(
    batch: Batch, kept: Array, valid: Array, teachers: Sequence[str]
) -> dict[str, Mean | Max]:
    """Tell how much is kept of each teacher's rows, where there are several."""
    if len(teachers) < 2:
        return {}
    route = jnp.asarray(batch.rollout.prompts.teacher)
    return {
        f"fire/keep_fraction_{name}": Mean.of(kept, valid & (route == index))
        for index, name in enumerate(teachers)
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
