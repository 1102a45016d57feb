"""The ranks of a page are those of the filter: what the slider shows is what it would drop."""

import dataclasses
import math

import numpy as np
import pytest

from fireopd_jax.method.batch import stage_context
from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.method.filtering.trajectories import stays
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.report.filtering import evenly, filtering, ranks
from fireopd_jax.report.reading import RunFiles
from tests.report.made import make_case, make_run


def kept(rank, of, fraction):
    """The rule of the page's script."""
    return [r >= 0 and r >= math.floor(fraction * n + 1e-9) for r, n in zip(rank, of, strict=True)]


@pytest.mark.parametrize("groups", [1, 3])
def test_ranks_give_what_the_filter_keeps_at_every_fraction(groups):
    rng = np.random.default_rng(groups)
    score = rng.choice([-3.0, -2.0, -1.5, -1.0, np.nan, -np.inf], 50).astype(np.float32)
    group, ranked = rng.integers(0, groups, 50), rng.random(50) < 0.9
    rank, of = ranks(score, group, ranked)
    last = np.where(ranked, group, groups).astype(np.int32)
    for fraction in np.linspace(0, 1, 101):
        expected = ranked & np.asarray(stays(score, last, groups, float(fraction)))
        np.testing.assert_array_equal(kept(rank, of, fraction), expected)


@pytest.mark.parametrize("scope", ["batch", "teacher"])
@pytest.mark.parametrize("score", ["likelihood", "student_relative"])
def test_the_slider_agrees_with_the_filter_on_the_rows_of_a_run(scope, score, tmp_path):
    settings = [f"method.filter.scope={scope}", f"method.filter.score={score}"]
    run = make_run(tmp_path / "x", *settings, steps=1, every=1, rows=40, seed=3)
    files = RunFiles(run)
    rows = filtering(files, files.completions())["rows"]
    scores, rollout = make_case(40, 16, 0, int(np.random.default_rng(3).integers(1000)))
    context = stage_context(rollout, 2)
    filter = load_config(["smoke", *settings]).method.filter
    assert isinstance(filter, TeacherQuantile)
    real = np.flatnonzero(np.asarray(rollout.mask).any(axis=1))
    for fraction in np.linspace(0, 0.95, 20):
        other = dataclasses.replace(filter, drop_fraction=float(fraction))
        expected = np.asarray(other(scores, context)[0])[real]
        np.testing.assert_array_equal(kept(rows["rank"], rows["of"], fraction), expected)
    np.testing.assert_array_equal(kept(rows["rank"], rows["of"], 0.2), rows["kept"])


def test_rows_that_another_filter_dropped_are_not_ranked(tmp_path):
    filters = "[{kind: length_drop, drop_fraction: 0.25}, {kind: teacher_quantile}]"
    run = make_run(
        tmp_path / "x", f"method.filter={{kind: all_of, filters: {filters}}}", steps=1, every=1
    )
    files = RunFiles(run)
    found = filtering(files, files.completions())
    assert found["filters"] == ["length_drop", "teacher_quantile"]
    assert found["ranking"] == "teacher_quantile"
    rows = found["rows"]
    assert rows["by"].count("length_drop") == 5 and rows["by"].count("teacher_quantile") == 3
    other = [by == "length_drop" for by in rows["by"]]
    assert [rank == -1 for rank in rows["rank"]] == other
    assert [score is None for score in rows["score"]] == other
    assert max(rows["of"]) == 18  # floor(0.25 * 23) of 23 were dropped before
    assert kept(rows["rank"], rows["of"], 0.2) == rows["kept"]


def test_a_guard_after_the_ranking_filter_does_not_change_its_ranks(tmp_path):
    guard = "{kind: repetition_guard, ngram: 1, limit: 0.4}"
    filters = f"[{{kind: teacher_quantile}}, {guard}]"
    run = make_run(
        tmp_path / "x", f"method.filter={{kind: all_of, filters: {filters}}}", steps=1, every=1
    )
    files = RunFiles(run)
    rows = filtering(files, files.completions())["rows"]
    assert rows["by"].count("repetition_guard") > 0
    dropped = [not each for each in kept(rows["rank"], rows["of"], 0.2)]
    assert dropped == [by == "teacher_quantile" for by in rows["by"]]


def test_a_method_without_a_ranking_filter_shows_what_one_would_drop(tmp_path):
    run = make_run(tmp_path / "x", "method.filter={kind: keep_all}", steps=1, every=1)
    files = RunFiles(run)
    found = filtering(files, files.completions())
    assert (found["applied"], found["ranking"], found["fraction"]) == (False, "teacher_quantile", 0)
    order = np.argsort(found["rows"]["score"], kind="stable")
    np.testing.assert_array_equal(np.asarray(found["rows"]["rank"])[order], np.arange(23))


def test_indices_lie_evenly_and_end_at_the_last():
    assert evenly(5, 9) == [0, 1, 2, 3, 4]
    assert evenly(100, 3) == [0, 50, 99]
    assert evenly(100, 1) == [99]
    assert evenly(0, 3) == []
