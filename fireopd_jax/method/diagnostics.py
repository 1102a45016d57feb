"""Metrics of a scored and filtered batch, each defined once, as a mergeable sum or maximum.

    Batch, keep -> {name: Mean or Max}

Names follow those of other libraries. Entropies and log-probs are in nats, over the response
tokens of all valid rows unless a name says otherwise.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from fireopd_jax.method.stage import Keep
from fireopd_jax.metrics import Max, Mean
from fireopd_jax.ops.ranks import (
    masked_quantile,
    masked_quantiles,
    median_by_id,
    repetition_rate,
)
from fireopd_jax.types import Array, Batch, Rewritten, Rollout, TokenStats, Writer

FOREIGN, OFTEN = 10.0, 8
"""Foreign token ids: median |log p/q| above FOREIGN nats, in at least OFTEN occurrences."""
NGRAM = 4
"""Length n of the n-grams whose repetition is counted."""
BINS = 4
"""Equal parts of the longest response; some metrics are computed for each part."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
INTERIOR = 0.05, 0.95
"""Between these an agreement is neither none nor all."""
TOP = 0.99
"""Quantile from which on an advantage belongs to the top 1 %."""


def of_batch(
    batch: Batch, keep: Keep, room: int, teachers: Sequence[str] = ()
) -> dict[str, Mean | Max]:
    """Return the metrics of rollouts, scores and weights, by name.

    `room` is the maximum response length; `teachers` are the teachers' names by route. Metrics of
    the teacher's log-probabilities are absent where `scores.teacher` is None.
    """
    rollout, scores = batch.rollout, batch.scores
    mask, keep = jnp.asarray(rollout.mask), jnp.asarray(keep)
    valid, length = mask.any(axis=1), mask.sum(axis=1)
    kept = keep if keep.ndim == 1 else keep.any(axis=1)
    counted = batch.coefficient > 0
    unfinished = ~rollout.finished
    weight = batch.weight
    by_part = _of_support(batch) | _of_quarters(batch, room) | _of_grades(batch)
    by_part |= _of_routes(batch, kept, valid, teachers)
    by_part |= _of_refinement(batch) | _of_audit(batch, valid)
    if scores.teacher is not None:
        by_part |= _of_teacher(batch, scores.teacher, kept, valid) | _of_advantages(batch)
    if rollout.policy is None:  # else the update computes it: these scores are the sampler's
        by_part |= of_sampler(scores.student, rollout)
    return by_part | {
        "num_tokens": Mean(length.sum().astype(jnp.float32), jnp.float32(1)),
        "completions/mean_length": Mean.of(length, valid),
        "completions/max_length": Max.of(length, valid),
        "completions/clipped_ratio": Mean.of(unfinished, valid),
        "completions/eos_rate": Mean.of(rollout.finished, valid),
        "completions/empty_rate": Mean.of(~valid),
        "completions/repetition_rate": Mean.of(repetition_rate(rollout.tokens, mask, NGRAM), valid),
        "completions/filled_fraction": Mean.of(length / room, valid),
        "student_entropy": Mean.of(scores.student.entropy, mask),
        "student_entropy_max": Max.of(scores.student.entropy, mask),
        "method/keep_fraction": Mean.of(kept, valid),
        "method/token_keep_fraction": Mean.of(counted, mask),
        "method/kept_tokens": Mean(counted.sum().astype(jnp.float32), jnp.float32(1)),
        "method/dropped_clipped_ratio": Mean.of(unfinished, valid & ~kept),
        "method/token_weight_mean": Mean.of(weight, counted),
        "method/token_weight_max": Max.of(weight, counted),
        "method/token_weight_square": Mean.of(weight**2, counted),
    }


def of_sampler(student: TokenStats, rollout: Rollout) -> dict[str, Mean | Max]:
    """Return mean and maximum of |log pi - log mu| over the student's own tokens.

    pi is the student in a forward pass, mu the distribution that the sampler drew from, after
    temperature, top-p, top-k and min-p.
    """
    own = jnp.asarray(rollout.mask) & (jnp.asarray(rollout.writer) == Writer.STUDENT)
    gap = jnp.abs(student.logprob - rollout.logprob)
    return {"sampler/logprob_gap": Mean.of(gap, own), "sampler/logprob_gap_max": Max.of(gap, own)}


def _of_refinement(batch: Batch) -> dict[str, Mean | Max]:
    """Return the metrics of rewrites against the responses that they replace, and of leaks.

    The negative log-likelihood of rewrites under the student, beside that of its own responses, is
    the measure of how far they are from its policy. References: arXiv 2606.08432.
    """
    rollout, student = batch.rollout, batch.scores.student
    out: dict[str, Mean | Max] = {}
    if rollout.leaked is not None:
        out["refine/leaked_fraction"] = Mean.of(rollout.leaked)
    original = rollout.original
    if original is None:
        return out
    own, outcome = jnp.asarray(original.mask), jnp.asarray(original.outcome)
    asked = own.any(axis=1) & (outcome != Rewritten.KEPT)
    done = outcome == Rewritten.DONE
    new = jnp.asarray(rollout.mask) & done[:, None]
    length, before = new.sum(axis=1), jnp.maximum(own.sum(axis=1), 1)
    names = {each: each.name.lower() for each in Rewritten if each != Rewritten.KEPT}
    out |= {
        f"refine/{name}_fraction": Mean.of(outcome == each, asked) for each, name in names.items()
    }
    return out | {
        "refine/length_ratio": Mean(
            masked_quantile((length / before)[:, None], done[:, None], 0.5), jnp.float32(1)
        ),
        "refine/original_length": Mean.of(own.sum(axis=1), asked),
        "refine/nll": Mean.of(-student.logprob, new),
        "refine/nll_original": Mean.of(-original.model_logprob, own & asked[:, None]),
        "refine/same_tokens": Mean.of(jnp.asarray(original.tokens) == rollout.tokens, new & own),
    }


def _of_teacher(
    batch: Batch, teacher: TokenStats, kept: Array, valid: Array
) -> dict[str, Mean | Max]:
    """Return the metrics of the teacher's log-probabilities, and of their gap to the student's."""
    mask, student = jnp.asarray(batch.rollout.mask), batch.scores.student
    log_ratio = student.logprob - teacher.logprob
    score = jnp.where(mask, teacher.logprob, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
    # A served teacher returns no entropies.
    of_entropy: dict[str, Mean | Max] = {}
    early = batch.rollout.early
    if early is None or early.teacher is None:
        of_entropy = {
            "distill/entropy_gap": Mean.of(jnp.abs(teacher.entropy - student.entropy), mask),
            "teacher_entropy": Mean.of(teacher.entropy, mask),
            "teacher_entropy_max": Max.of(teacher.entropy, mask),
        }
    return of_entropy | {
        "distill/reverse_kl": Mean.of(log_ratio, mask),
        "distill/advantage_positive_fraction": Mean.of(log_ratio < 0, mask),
        "distill/log_ratio_max": Max.of(jnp.abs(log_ratio), mask),
        "distill/log_ratio_above_10": Mean.of(jnp.abs(log_ratio) > FOREIGN, mask),
        "distill/foreign_fraction": _of_foreign(batch),
        "teacher_logprob": Mean.of(teacher.logprob, mask),
        "method/score_kept": Mean.of(score, valid & kept),
        "method/score_dropped": Mean.of(score, valid & ~kept),
    }


def _of_advantages(batch: Batch) -> dict[str, Mean | Max]:
    """Return mean square and maximum of A = log pi_T - log pi_S, and its top-1 % share of |A|."""
    mask, scores = jnp.asarray(batch.rollout.mask), batch.scores
    advantage = scores.advantage
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
    """Return the fraction of tokens whose id is foreign to one model, mostly template tokens.

    A token id counts by the median of |A| over its occurrences, so that a single unlikely sample
    does not.
    """
    mask, scores = jnp.asarray(batch.rollout.mask).reshape(-1), batch.scores
    size = jnp.abs(scores.advantage).reshape(-1)
    ids = jnp.asarray(batch.rollout.tokens).reshape(-1)
    median, count = median_by_id(ids, size, mask)
    return Mean.of((median > FOREIGN) & (count >= OFTEN), mask)


def _of_quarters(batch: Batch, room: int) -> dict[str, Mean | Max]:
    """Return metrics for each quarter of the longest response; late tokens degrade first."""
    mask, scores = jnp.asarray(batch.rollout.mask), batch.scores
    part = jnp.minimum(jnp.arange(mask.shape[1]) * BINS // room, BINS - 1)
    out: dict[str, Mean | Max] = {}
    for index in range(BINS):
        inside = mask & (part == index)[None]
        name = f"quarter_{index + 1}"
        out[f"distill/student_entropy_{name}"] = Mean.of(scores.student.entropy, inside)
        if scores.teacher is None:
            continue
        size = jnp.abs(scores.advantage)
        here = (inside & jnp.isfinite(size)).any()
        quantiles = masked_quantiles(size, inside, tuple(QUANTILES.values()))
        for label, quantile in zip(QUANTILES, quantiles, strict=True):
            value = Mean(jnp.where(here, quantile, 0.0), here.astype(jnp.float32))
            out[f"distill/log_ratio_{label}_{name}"] = value
    return out


def _of_grades(batch: Batch) -> dict[str, Mean | Max]:
    """Return the metrics of graded responses; {} where nothing was graded."""
    rollout, scores = batch.rollout, batch.scores
    if rollout.correct is None:
        return {}
    mask = jnp.asarray(rollout.mask)
    valid, group = mask.any(axis=1), jnp.asarray(rollout.prompts.group)
    same = (group[:, None] == group[None]) & valid[None]
    right = jnp.asarray(rollout.correct) > 0
    out: dict[str, Mean | Max] = {
        "completions/correct": Mean.of(right, valid),
        "completions/group_all_correct": Mean.of((~same | right[None]).all(axis=1), valid),
    }
    if scores.margin is not None:
        out["distill/margin_gap"] = Mean.of(scores.margin.gap, valid)
        out["distill/margin_shift"] = Mean.of(jnp.abs(scores.margin.shift), valid)
    return out


def _of_routes(
    batch: Batch, kept: Array, valid: Array, teachers: Sequence[str]
) -> dict[str, Mean | Max]:
    """Return the fraction of kept rows for each of several teachers; {} for one."""
    if len(teachers) < 2:
        return {}
    route = jnp.asarray(batch.rollout.prompts.teacher)
    return {
        f"method/keep_fraction_{name}": Mean.of(kept, valid & (route == index))
        for index, name in enumerate(teachers)
    }


def _of_audit(batch: Batch, valid: Array) -> dict[str, Mean | Max]:
    """Return the metrics of audited chunks; {} where nothing was audited.

    An interior fraction near 0 means that the similarity only ever finds all or nothing.
    """
    rollout, chunks = batch.rollout, batch.scores.chunks
    if rollout.audit is None or chunks is None:
        return {}
    mask = jnp.asarray(rollout.mask)
    samples = jnp.asarray(rollout.audit.samples)
    real = (jnp.asarray(rollout.audit.length) > 0) & (samples > 0)
    share = rollout.audit.agreement / jnp.maximum(samples, 1)
    low, high = INTERIOR
    return {
        "audit/chunks": Mean.of(real.sum(axis=1), valid),
        "audit/agreement": Mean.of(share, real),
        "audit/interior_fraction": Mean.of((share > low) & (share < high), real),
        "audit/target": Mean.of(chunks.target, chunks.audited),
        "audit/prior": Mean.of(chunks.prior, chunks.audited),
        "audit/audited_fraction": Mean.of(chunks.audited, mask),
    }


def _of_support(batch: Batch) -> dict[str, Mean | Max]:
    """Return the teacher's mass on the support and the overlap of the top-K sets, where scored.

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
