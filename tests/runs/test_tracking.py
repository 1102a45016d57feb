import io
import json
import logging
import math
import sys

import numpy as np
import pytest

from fireopd_jax.runs.log import Log
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.terminal.curves import curve
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.tables import table


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_each_call_is_a_line_at_once(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log(1, {"loss": np.float32(0.5), "tokens": np.int64(7)})
    tracker.log(2, {"loss": 0.25, "tokens": None})
    # Before any close: a kill loses nothing.
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "tokens": 7},
        {"step": 2, "loss": 0.25, "tokens": None},
    ]
    assert tracker.history("loss") == [(1, 0.5), (2, 0.25)]
    assert tracker.history("tokens") == [(1, 7.0)]
    tracker.close()


def test_numbers_without_json_are_strings_and_come_back(tmp_path):
    def refuse(constant: str):
        raise AssertionError(constant)

    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": math.nan})
        tracker.log(2, {"loss": -math.inf})
        [(_, first), (_, second)] = tracker.history("loss")
    assert math.isnan(first) and second == -math.inf
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["loss"] for line in text] == ["nan", "-inf"]


def test_truncate_forgets_what_a_resumed_run_repeats(tmp_path):
    with Tracker(tmp_path) as tracker:
        for step in range(5):
            tracker.log(step, {"loss": step / 2})
        tracker.truncate(3)
        tracker.log(3, {"loss": 9.0})
        assert tracker.history("loss") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_torn_last_line_is_dropped(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with Tracker(tmp_path) as tracker:
        tracker.log(2, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_plain_progress_speaks_at_most_every_ten_seconds(capsys):
    clock = Clock()
    with progress("train", 300, interactive=False, clock=clock) as advance:
        for step in range(120):
            clock.now += 0.25
            advance(loss=step / 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()
    assert said[0] == "train 40/300  4.0 it/s  loss 0.39"
    assert said[-1] == "train 120/300  4.0 it/s  loss 1.19"
    assert len(said) == 3


def test_plain_progress_has_a_last_line_even_when_it_breaks(capsys):
    clock = Clock()
    with (
        pytest.raises(KeyError),
        progress("train", 9, interactive=False, clock=clock) as advance,
    ):
        clock.now = 4.0
        advance(2)
        raise KeyError
    assert capsys.readouterr().err == "train 2/9  2.0 s/it\n"


def test_live_progress_shows_count_rate_and_fields(monkeypatch):
    clock, screen = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("train", 4, interactive=True, clock=clock) as advance:
        clock.now = 2.0
        advance(4, loss=0.40625)
    last = screen.getvalue()
    assert "4/4" in last and "2.0 it/s" in last and "loss 0.4062" in last and "eta" in last


def test_log_prints_and_keeps(tmp_path, capsys):
    with Log(tmp_path / "logs") as log:
        log("one\ntwo")
    assert capsys.readouterr().out == "one\ntwo\n"
    kept = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert [line[20:] for line in kept] == ["one", "two"]


def test_log_keeps_the_warnings_of_modules_while_it_is_open(tmp_path):
    warn = logging.getLogger("fireopd_jax.models.somewhere").warning
    with Log(tmp_path / "logs"):
        warn("m: one file is read, another is not")
    warn("afterwards")
    kept = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert [line[20:] for line in kept] == ["m: one file is read, another is not"]


def test_table_prints_cells_as_they_are(capsys):
    table([["[a]", 0.123456, None], ["b", 2, 3]], ["name", "value", "n"], title="Scores")
    out = capsys.readouterr().out
    assert "Scores" in out and "[a]" in out and "0.1235" in out
    [first] = [line for line in out.splitlines() if "[a]" in line]
    [second] = [line for line in out.splitlines() if "b " in line]
    assert len(first) == len(second)
    # Numbers stand to the right: both end in the same column.
    assert first.index("0.1235") + 6 == second.index(" 2 ") + 2


def test_curve_places_its_points():
    drawn = curve([(0, 0.0), (5, 0.5), (10, 1.0)], "accuracy", width=11, height=3).splitlines()
    assert drawn == [
        "accuracy",
        "  1 ┤          ●",
        "0.5 ┤     ●",
        "  0 ┤●",
        "    └───────────",
        "     0        10  step",
    ]


def test_curves_share_their_axes_and_are_named():
    drawn = curve({"student": [(0, 0.0), (10, 1.0)], "teacher": [(0, 2.0)]}, "", 11, 3)
    assert drawn.splitlines()[0] == "2 ┤○"
    assert "● student   ○ teacher" in drawn


@pytest.mark.parametrize("points", [[], [(3, math.nan)], [(3, 0.5)], [(1, 2.0), (9, 2.0)]])
def test_curve_bears_few_points(points):
    drawn = curve(points, "loss")
    assert drawn.startswith("loss\n")
    assert drawn.count("●") == sum(not math.isnan(value) for _, value in points)
