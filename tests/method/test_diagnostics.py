"""Metrics of a batch against plain NumPy."""

import dataclasses

import numpy as np
import pytest

from fireopd_jax.method.chunks import make_chunks
from fireopd_jax.method.diagnostics import of_batch
from fireopd_jax.method.filtering import AllOf, KeepAll, LengthDrop, Prefix, TeacherQuantile
from fireopd_jax.method.reweighting import ConfidenceConfusion, Uniform
from fireopd_jax.metrics import results
from fireopd_jax.training.update import of_support
from fireopd_jax.types import Overlap, StageContext, Support
from fireopd_jax.verify import reference_stages as oracle
from fireopd_jax.verify.cases import audit_arrays, make_audit
from tests import cases


def described(seed=0, drop_fraction=0.3):
    scores, mask, teacher = cases.random_case(seed)
    rollout = cases.make_rollout(mask, teacher)
    finished = mask.any(axis=1) & (np.arange(len(mask)) % 2 == 0)
    rollout = dataclasses.replace(rollout, finished=finished)
    stages = TeacherQuantile(drop_fraction=drop_fraction), ConfidenceConfusion()
    batch, keep = cases.assembled(rollout, scores, *stages, "seq", 2)
    return results(of_batch(batch, keep, 10)), batch, np.asarray(keep), mask, finished


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_numpy(seed):
    values, batch, keep, mask, finished = described(seed)
    valid, length = mask.any(axis=1), mask.sum(axis=1)
    student, teacher = (np.asarray(s.logprob) for s in (batch.scores.student, batch.scores.teacher))
    gap = (student - teacher)[mask]
    score = np.where(mask, teacher, 0).sum(axis=1) / np.maximum(length, 1)
    weight = np.asarray(batch.weight)[mask & keep[:, None]]
    expected = {
        "num_tokens": length.sum(),
        "completions/mean_length": length[valid].mean(),
        "completions/max_length": length.max(),
        "completions/clipped_ratio": (~finished)[valid].mean(),
        "completions/filled_fraction": (length[valid] / 10).mean(),
        "distill/reverse_kl": gap.mean(),
        "distill/advantage_positive_fraction": (gap < 0).mean(),
        "distill/log_ratio_max": np.abs(gap).max(),
        "distill/log_ratio_above_10": (np.abs(gap) > 10).mean(),
        "distill/entropy_gap": np.abs(
            np.asarray(batch.scores.teacher.entropy) - np.asarray(batch.scores.student.entropy)
        )[mask].mean(),
        "teacher_logprob": teacher[mask].mean(),
        "student_entropy": np.asarray(batch.scores.student.entropy)[mask].mean(),
        "teacher_entropy_max": np.asarray(batch.scores.teacher.entropy)[mask].max(),
        "method/keep_fraction": keep[valid].mean(),
        "method/kept_tokens": length[keep].sum(),
        "method/score_kept": score[keep].mean(),
        "method/score_dropped": score[valid & ~keep].mean(),
        "method/dropped_clipped_ratio": (~finished)[valid & ~keep].mean(),
        "method/token_weight_mean": weight.mean(),
        "method/token_weight_max": weight.max(),
        "method/token_weight_square": (weight**2).mean(),
        "sampler/logprob_gap": np.abs(student[mask]).mean(),
        "completions/eos_rate": finished[valid].mean(),
        "completions/empty_rate": (~valid).mean(),
        "completions/repetition_rate": np.mean(
            [max(n - 4, 0) / max(n - 3, 1) for n in length[valid]]
        ),
        "distill/advantage_square": (gap**2).mean(),
        "distill/advantage_max": (-gap).max(),
        "distill/advantage_top_share": np.abs(gap).max() / np.abs(gap).sum(),
        "method/token_keep_fraction": length[keep].sum() / length.sum(),
    }
    # A room of 10 in quarters: tokens 0 to 2, 3 and 4, 5 to 7, 8 and 9.
    for part, inside in {1: slice(0, 3), 2: slice(3, 5), 3: slice(5, 8)}.items():
        here = np.abs(student - teacher)[:, inside][mask[:, inside]]
        expected[f"distill/log_ratio_p90_quarter_{part}"] = np.quantile(here, 0.9)
        entropy = np.asarray(batch.scores.student.entropy)[:, inside][mask[:, inside]]
        expected[f"distill/student_entropy_quarter_{part}"] = entropy.mean()
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


def test_the_kept_are_liked_better_than_the_dropped():
    values, *_ = described()
    assert values["method/score_kept"] > values["method/score_dropped"]


def test_what_does_not_exist_is_nan_or_none_and_the_rest_is_finite():
    values, *_ = described(drop_fraction=0.0)
    absent = {"method/score_dropped", "method/dropped_clipped_ratio"}
    # Responses of up to 6 tokens have none in the last quarter of a room of 10.
    absent |= {name for name in values if name.endswith("quarter_4")}
    assert len(absent) == 6
    for name in values.keys() - absent:
        assert np.isfinite(values[name]), name
    assert not any(np.isfinite(values.get(name, np.nan)) for name in absent)


def test_support_and_overlap_ignore_padding():
    """Values outside the mask are junk and must not change the metrics."""
    scores, mask, teacher = cases.random_case(2)
    rng = np.random.default_rng(0)
    junk = np.where(mask, 0, np.nan).astype(np.float32)
    ids = np.stack([np.zeros(mask.shape), np.full(mask.shape, -1)], axis=-1).astype(np.int32)
    logprob = np.log(np.full((*mask.shape, 2), 0.25, np.float32)) + junk[..., None]
    parts = {
        name: (rng.uniform(size=mask.shape).astype(np.float32) + junk)
        for name in ("ratio", "student_mass", "teacher_mass", "advantage")
    }
    scores = dataclasses.replace(scores, support=Support(ids, logprob), overlap=Overlap(**parts))
    rollout = cases.make_rollout(mask, teacher)
    tokens = np.where(np.arange(mask.shape[1]) % 2 == 0, 0, 7) * np.ones_like(rollout.tokens)
    rollout = dataclasses.replace(rollout, tokens=tokens.astype(np.int32))
    batch, keep = cases.assembled(rollout, scores, KeepAll(), Uniform(), "seq", 2)
    values = results(of_batch(batch, keep, 10))
    for name, part in {
        "overlap_ratio": "ratio",
        "overlap_mass_student": "student_mass",
        "overlap_mass_teacher": "teacher_mass",
        "overlap_advantage": "advantage",
    }.items():
        assert values[f"distill/{name}"] == pytest.approx(parts[part][mask].mean(), rel=1e-5)
    assert values["distill/in_support_fraction"] == pytest.approx((tokens == 0)[mask].mean())
    assert values["distill/support_mass_teacher"] == pytest.approx(0.25)


def test_mistakes_are_not_foreign_but_what_is_unlikely_everywhere_is():
    mask = np.ones((8, 4), bool)
    tokens = np.tile(np.array([5, 6, 7, 8], np.int32), (8, 1))
    gap = np.zeros((8, 4), np.float32)
    gap[:, 1] = 20.0  # 6: always
    gap[:3, 2] = 20.0  # 7: three times of eight
    scores = cases.make_scores(0 * gap, -gap, gap, gap)
    rollout = dataclasses.replace(cases.make_rollout(mask), tokens=tokens)
    batch, keep = cases.assembled(rollout, scores, KeepAll(), Uniform(), "seq", 1)
    values = results(of_batch(batch, keep, 4))
    assert values["distill/log_ratio_above_10"] == pytest.approx(11 / 32)
    assert values["distill/foreign_fraction"] == pytest.approx(1 / 4)


def test_each_of_several_filters_tells_what_it_keeps_of_what_reaches_it():
    scores, mask, teacher = cases.random_case(0)
    rows = StageContext(mask, teacher, 2)
    filters = LengthDrop(drop_fraction=0.3), Prefix(window=2, least=0.0), LengthDrop()
    left = [AllOf(filters=filters[: n + 1])(scores, rows)[0] for n in range(3)]
    counts = [int(x.sum()) for x in (mask, *left)]
    assert counts[0] > counts[1] > counts[2] > counts[3] > 0
    assert results(AllOf(filters=filters).metrics(scores, rows, ())) == {
        "method/keep_fraction_by_length_drop": pytest.approx(counts[1] / counts[0]),
        "method/keep_fraction_by_prefix": pytest.approx(counts[2] / counts[1]),
        "method/keep_fraction_by_length_drop_2": pytest.approx(counts[3] / counts[2]),
    }


def test_divergences_on_the_support_have_one_bucket_of_the_rest_and_stay_below_the_whole():
    scores, mask, teacher = cases.random_case(3)
    rng = np.random.default_rng(3)
    log_p, log_q = np.log(rng.dirichlet(np.ones(9), (2, *mask.shape)))
    ids = np.broadcast_to(np.array([4, -1, 0, 7], np.int32), (*mask.shape, 4))
    words, junk = [4, 0, 7], np.where(mask, 0, np.nan)[..., None]

    def at_ids(log):
        return np.where(ids >= 0, log[..., np.maximum(ids, 0)[0, 0]] + junk, 9).astype(np.float32)

    support = Support(ids, at_ids(log_q))
    scores = dataclasses.replace(scores, support=support)
    rollout = cases.make_rollout(mask, teacher)
    batch, _ = cases.assembled(rollout, scores, KeepAll(), Uniform(), "seq", 2)
    student = dataclasses.replace(scores.student, support=at_ids(log_p))
    found = results(of_support(student, batch, mask))

    def buckets(log):
        few = np.exp(log[..., words])
        return np.concatenate([few, 1 - few.sum(axis=-1, keepdims=True)], axis=-1)[mask]

    def divergence(p, q):
        return (p * np.log(p / q)).sum(axis=-1).mean()

    p, q = buckets(log_p), buckets(log_q)
    whole = divergence(np.exp(log_p)[mask], np.exp(log_q)[mask])
    assert found["policy/support_reverse_kl"] == pytest.approx(divergence(p, q), rel=1e-5)
    assert found["policy/support_forward_kl"] == pytest.approx(divergence(q, p), rel=1e-5)
    assert found["policy/support_mass"] == pytest.approx(p[:, :-1].sum(axis=-1).mean(), rel=1e-5)
    assert found["policy/support_reverse_kl"] < whole


def test_audits_are_described_by_chunk_and_by_token():
    scores, mask, teacher = cases.random_case(1)
    rollout = dataclasses.replace(cases.make_rollout(mask, teacher), audit=make_audit(mask.sum(1)))
    own = np.where(mask, scores.student.logprob, 0)
    chunks = make_chunks(rollout.audit, own, np.zeros(len(mask), np.int32), 1.0)
    scores = dataclasses.replace(scores, teacher=None, chunks=chunks)
    batch, keep = cases.assembled(rollout, scores, KeepAll(), Uniform(), "token", 2)
    values = results(of_batch(batch, keep, 10))
    audit = audit_arrays(rollout.audit)
    shares = [k / n for a, c, k, n in zip(*(x.ravel() for x in audit), strict=True) if n]
    audited, target, prior, _ = oracle.chunk_targets(own, audit, np.zeros(len(mask)), 1.0)
    expected = {
        "audit/chunks": len(shares) / mask.any(axis=1).sum(),
        "audit/agreement": np.mean(shares),
        "audit/interior_fraction": np.mean([0.05 < share < 0.95 for share in shares]),
        "audit/target": target[audited].mean(),
        "audit/prior": prior[audited].mean(),
        "audit/audited_fraction": audited.sum() / mask.sum(),
    }
    assert {k: values[k] for k in values if k.startswith("audit/")} == pytest.approx(expected)
    assert 0 < expected["audit/audited_fraction"] < 1 and len(shares) > 3
    without = dataclasses.replace(batch, rollout=dataclasses.replace(rollout, audit=None))
    assert not any(name.startswith("audit/") for name in of_batch(without, keep, 10))
