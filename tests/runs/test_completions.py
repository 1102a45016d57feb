"""What is kept of a step: every token's numbers, and why a row was dropped."""

import dataclasses

import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.data.sources import Row
from fireopd_jax.method.batch import stage_context
from fireopd_jax.method.filtering import (
    AllOf,
    KeepAll,
    LengthDrop,
    RandomDrop,
    RepetitionGuard,
    TeacherQuantile,
    Tip,
)
from fireopd_jax.method.reweighting import ConfidenceConfusion, Uniform
from fireopd_jax.runs.completions import MOST_WORDS, Texts, on_host, write_completions
from fireopd_jax.types import Audit, Original, Rewritten, Support
from tests import cases

ROWS = [Row(({"role": "user", "content": str(i)},), None, None, None, "rows:1") for i in range(40)]


def pieces(ids):
    return [f"<{i}>" for i in ids]


TEXTS = Texts(ROWS, ("a", "b"), lambda ids: "".join(pieces(ids)), pieces, str)
CONTROLS = [RandomDrop(), LengthDrop(drop="longest"), LengthDrop(drop="shortest")]


def case(rows=12, tokens=9, seed=1):
    scores, mask, teacher = cases.random_case(seed, rows, tokens)
    rollout = cases.make_rollout(mask, teacher)
    ids = np.random.default_rng(seed).integers(0, 50, mask.shape).astype(np.int32)
    return scores, dataclasses.replace(rollout, tokens=ids)


def written(folder, scores, rollout, filter=None, reweight=None):
    """Return the table of a batch, and the batch itself."""
    filter, reweight = filter or KeepAll(), reweight or Uniform()
    context = stage_context(rollout, 2)
    batch, keep = cases.assembled(rollout, scores, filter, reweight, "seq", 2)
    batch, keep = on_host(batch), np.asarray(keep)
    file = folder / "step.parquet"
    judged = filter.judged(batch.scores, context, keep)
    measured = reweight.measured(batch.scores, context, keep)
    write_completions(file, batch, keep, TEXTS, judged=judged, measured=measured)
    return pyarrow.parquet.read_table(file).to_pylist(), batch, keep


def test_each_token_has_its_numbers(tmp_path):
    scores, rollout = case()
    table, batch, _ = written(tmp_path, scores, rollout, reweight=ConfidenceConfusion())
    assert len(table) == 11  # row 1 has no token
    arrays = {
        "tokens": rollout.tokens,
        "student_logprob": scores.student.logprob,
        "student_entropy": scores.student.entropy,
        "teacher_logprob": scores.teacher.logprob,
        "teacher_entropy": scores.teacher.entropy,
        "weight": batch.weight,
        "coefficient": batch.coefficient,
    }
    for line in table:
        real = np.asarray(rollout.mask)[line["row"]]
        for name, values in arrays.items():
            np.testing.assert_array_equal(line[name], np.asarray(values)[line["row"]][real], name)
        assert "".join(line["token_text"]) == line["response"]
        mean = np.mean(np.asarray(scores.teacher.logprob)[line["row"]][real])
        assert line["teacher_score"] == pytest.approx(mean, rel=1e-6)


def test_the_weight_can_be_computed_again_from_what_is_written(tmp_path):
    table, _, _ = written(tmp_path, *case(), reweight=ConfidenceConfusion(alpha=2.0, beta=0.5))
    for line in table:
        sure = 1 - np.asarray(line["teacher_entropy"]) / line["teacher_entropy_top"]
        unsure = np.asarray(line["student_entropy"]) / line["student_entropy_top"]
        weight = (1 + 2.0 * sure) * (1 + 0.5 * unsure)
        np.testing.assert_allclose(weight / weight.mean(), line["weight"], rtol=1e-5)


@pytest.mark.parametrize("scope", ["batch", "teacher"])
def test_dropped_rows_name_the_filter_its_score_and_threshold(scope, tmp_path):
    scores, rollout = case(rows=24)
    filter = TeacherQuantile(drop_fraction=0.3, scope=scope)
    table, _, keep = written(tmp_path, scores, rollout, filter)
    assert {line["kept"] for line in table} == {True, False}
    for line in table:
        assert line["kept"] == bool(keep[line["row"]])
        assert line["dropped_by"] == (None if line["kept"] else "teacher_quantile")
        assert line["filter_score"] == pytest.approx(line["teacher_score"], rel=1e-6)
        assert line["kept"] == (line["filter_score"] >= line["filter_threshold"])
    if scope == "teacher":
        assert len({(line["teacher"], line["filter_threshold"]) for line in table}) == 2


def test_of_several_filters_the_one_that_dropped_a_row_is_named(tmp_path):
    scores, rollout = case(rows=20, tokens=12)
    tokens = np.array(rollout.tokens)
    tokens[0] = 7  # repeats itself
    rollout = dataclasses.replace(rollout, tokens=tokens)
    filters = AllOf(
        filters=(RepetitionGuard(ngram=2, limit=0.6), TeacherQuantile(drop_fraction=0.4))
    )
    table, _, _ = written(tmp_path, scores, rollout, filters)
    by = {line["row"]: line["dropped_by"] for line in table}
    assert by[0] == "repetition_guard" and table[0]["filter_threshold"] == pytest.approx(0.6)
    assert table[0]["filter_score"] > 0.6
    assert list(by.values()).count("teacher_quantile") == 7  # floor(0.4 * 18): row 0 is not ranked
    kept = [line for line in table if line["kept"]]
    assert all(line["filter_score"] >= line["filter_threshold"] < 0 for line in kept)


@pytest.mark.parametrize("filter", CONTROLS)
def test_controls_have_scores_too(filter, tmp_path):
    table, _, _ = written(tmp_path, *case(rows=20, tokens=12), filter)
    longest = getattr(filter, "drop", "") == "longest"
    for line in table:
        inside = line["filter_score"] <= line["filter_threshold"]
        if line["filter_score"] != line["filter_threshold"]:
            assert line["kept"] == (inside if longest else not inside)
    assert sum(not line["kept"] for line in table) == 3  # floor(0.2 * 19)


def test_filters_of_tokens_say_which_they_keep(tmp_path):
    scores, rollout = case()
    scores = dataclasses.replace(scores, reverse_kl=-scores.student.logprob)
    table, _, keep = written(tmp_path, scores, rollout, Tip(keep_fraction=0.5))
    for line in table:
        real = np.asarray(rollout.mask)[line["row"]]
        np.testing.assert_array_equal(line["token_kept"], keep[line["row"]][real])
        assert line["filter_score"] is None and line["filter_threshold"] is None


def test_the_likeliest_words_of_the_support_are_kept_in_order(tmp_path):
    scores, rollout = case()
    shape = (*rollout.mask.shape, MOST_WORDS + 3)
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1).astype(np.int32)
    ids[..., 0] = -1
    logprob = np.where(ids < 0, -np.inf, -rng.exponential(1.0, shape)).astype(np.float32)
    scores = dataclasses.replace(scores, support=Support(ids, logprob))
    table, _, _ = written(tmp_path, scores, rollout)
    line = table[0]
    assert len(line["teacher_top_ids"]) == len(line["tokens"])
    for t, found in enumerate(line["teacher_top_ids"]):
        best = np.argsort(-logprob[0, t], kind="stable")[:MOST_WORDS]
        assert found == ids[0, t][best].tolist()
        assert line["teacher_top_text"][t] == [f"<{i}>" for i in found]
        np.testing.assert_array_equal(line["teacher_top_logprob"][t], logprob[0, t][best])


def test_audited_chunks_have_place_length_and_similarity(tmp_path):
    scores, rollout = case()
    anchors = np.full((12, 2), -1, np.int32)
    anchors[0] = [1, 4]
    length = np.where(anchors < 0, 0, [[2, 3]]).astype(np.int32)
    samples = np.where(anchors < 0, 0, 4).astype(np.float32)
    audit = Audit(anchors, length, samples * np.float32(0.25), samples)
    table, _, _ = written(tmp_path, scores, dataclasses.replace(rollout, audit=audit))
    found = [table[0][name] for name in ("audited_at", "audited_length", "agreement")]
    assert found == [[1, 4], [2, 3], [0.25, 0.25]]
    assert table[1]["audited_at"] == []


def test_a_rewrite_that_was_dropped_is_dropped_by_refine(tmp_path):
    scores, rollout = case()
    mask = np.array(rollout.mask)
    rewrite = np.zeros_like(mask)
    rewrite[2], mask[2] = mask[2], False
    outcome = np.zeros(len(mask), np.int32)
    outcome[2] = Rewritten.CUT
    before, logprob = np.array(rollout.mask), scores.student.logprob
    original = Original(rollout.tokens, before, logprob, outcome, rewrite)
    rollout = dataclasses.replace(rollout, mask=mask, original=original)
    table, _, _ = written(tmp_path, scores, rollout, TeacherQuantile())
    line = next(line for line in table if line["row"] == 2)
    assert (line["dropped_by"], line["refined"], line["tokens"]) == ("refine", "cut", [])
    assert line["teacher_score"] is None and line["filter_score"] is not None
