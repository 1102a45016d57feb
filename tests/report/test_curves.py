"""Curves keep their ends, means and extremes; alarms come once; lanes add up."""

import math
from array import array

import numpy as np
import pytest

from fireopd_jax.report.curves import curves, lanes, thinned
from fireopd_jax.report.reading import RunFiles, Series
from fireopd_jax.runs.tracking import Tracker, record_alarm
from tests.report.made import make_run


def series(values):
    return Series(array("q", range(1, len(values) + 1)), array("d", values))


def test_a_long_curve_keeps_means_and_extremes():
    values = np.sin(np.arange(1000) / 7)
    values[500] = 50.0
    found = thinned(series(values), 100)
    assert len(found["x"]) == 100 and found["x"][-1] == 1000
    assert np.mean(found["y"]) == pytest.approx(values.mean(), rel=1e-3)
    assert max(found["high"]) == 50.0 and min(found["low"]) == pytest.approx(values.min(), rel=1e-4)


def test_a_short_curve_is_as_it_is_and_gaps_stay_gaps():
    found = thinned(series([1.0, math.nan, 3.0, math.inf]))
    assert found == {"x": [1, 2, 3, 4], "y": [1.0, None, 3.0, None]}
    assert thinned(series([math.nan] * 8), 4)["y"] == [None] * 4


def test_scores_of_sets_have_their_intervals(tmp_path):
    run = RunFiles(make_run(tmp_path / "x"))
    with Tracker(run.path) as tracker:
        tracker.log(6, {"eval/aime/avg@4": 0.5, "eval/aime/interval_95": 0.125})
    found = curves(run, {"student": run.metrics("student")})
    assert found["points"]["eval/aime/avg@4"]["student"]["low"] == [0.375]
    assert found["points"]["eval/aime/avg@4"]["student"]["high"] == [0.625]
    assert found["key"][0] == "eval/aime/avg@4"
    assert found["titles"]["eval/aime/avg@4"] == "Right on aime, avg@4"


def test_an_alarm_of_a_resumed_run_comes_once(tmp_path):
    run = RunFiles(make_run(tmp_path / "x"))
    record_alarm(run.path, {"step": 2, "rule": "still", "metrics": ["grad_norm"], "text": "again"})
    record_alarm(run.path, {"step": 5, "rule": "cut", "metrics": [], "text": "later"})
    alarms = curves(run, {"student": run.metrics("student")})["alarms"]
    assert [(each["step"], each["text"]) for each in alarms] == [(2, "again"), (5, "later")]


def test_lanes_add_up(tmp_path):
    run = RunFiles(make_run(tmp_path / "x", steps=400, every=500))
    found = lanes(run, run.metrics("student"))
    assert [lane["name"] for lane in found["lanes"]] == ["rollout", "score", "update"]
    assert [lane["total"] for lane in found["lanes"]] == [100.0, 50.0, 25.0]
    assert set(found["lanes"][0]["each"]) == {0.25} and found["steps"][-1] == 400
