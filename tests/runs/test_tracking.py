import json
import math

import numpy as np

from fireopd_jax.runs.tracking import Tracker


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
