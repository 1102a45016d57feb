"""Trackers behind metrics.jsonl: what they get, what is not repeated, and what breaks them."""

import importlib.util
import json
import struct
import threading
from pathlib import Path

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.trackers import reporting, wandb_runs
from fireopd_jax.runs.trackers.base import Series
from fireopd_jax.runs.trackers.reporting import TRACKERS, Trackers, check_installed, flat
from fireopd_jax.runs.tracking import Tracker

CONFIG = {"run": {"steps": 4}}


class Recorded:
    """A tracker that remembers its calls by series, across the processes of a run."""

    extra = "wandb"

    def __init__(self, kept=True, replaces=False):
        self.calls, self.kept, self.replaces = {}, kept, replaces
        self.failing = lambda step: False

    def missing(self):
        return None

    def begin(self, folder, project):
        return frozenset(), "shown somewhere"

    def open(self, series: Series):
        return Writing(self, series)


class Writing:
    replaces = False

    def __init__(self, tracker, series):
        self.tracker, self.replaces = tracker, tracker.replaces
        self.calls = tracker.calls.setdefault(series.title, [])
        self.kept = tracker.kept and series.known
        self.calls.append(("open", series.first, series.run_id))

    def log(self, step, values):
        if self.tracker.failing(step):
            raise ConnectionError("the network is gone")
        self.calls.append((step, dict(values)))

    def table(self, step, columns, rows):
        self.calls.append((step, columns, rows))

    def summary(self, step, values):
        self.calls.append(("summary", step, values))

    def close(self, complete):
        self.calls.append(("close", complete))


@pytest.fixture
def tracker(monkeypatch):
    made = Recorded()
    monkeypatch.setitem(TRACKERS, "wandb", made)
    return made


def process(folder, first, last, lines=None, *, names=("wandb",), complete=True, home=None):
    """Log the steps of one process of a run: those from `first` on are written again."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    trackers = Trackers(names, folder, CONFIG, None, (lines if lines is not None else []).append)
    with Tracker(home or folder, trackers.reporter("student")) as tracker:
        tracker.truncate(first)
        for step in range(first, last + 1):
            tracker.log(step, {"loss": step / 2})
    trackers.close(complete)


def steps(calls):
    return [call[0] for call in calls if isinstance(call[0], int)]


def test_a_tracker_gets_what_the_file_has(tmp_path, tracker):
    lines = []
    (tmp_path / "logs").mkdir()
    trackers = Trackers(("wandb",), tmp_path, CONFIG, None, lines.append)
    reporter = trackers.reporter("student")
    with Tracker(tmp_path, reporter) as file:
        file.truncate(0)
        file.log(0, {"eval/held_out/avg@1": 0.5})
        file.log(1, {"loss": float("nan"), "interval": [0.1, 0.2], "text": "x", "none": None})
    reporter.table(1, [{"prompt": f"p{i}", "response": "r", "correct": True} for i in range(20)])
    trackers.summary(1, {"student_after": {"mean": 0.7, "name": "x"}})
    trackers.close(complete=True)
    opened, zero, one, table, summary, closed = tracker.calls[tmp_path.name]
    assert opened[:2] == ("open", 0) and zero == (0, {"eval/held_out/avg@1": 0.5})
    assert one[0] == 1 and sorted(one[1]) == ["interval/0", "interval/1", "loss"]
    assert len(table[2]) == reporting.SAMPLES and table[2][0][:2] == ["p0", "r"]
    assert summary == ("summary", 1, {"student_after/mean": 0.7}) and closed == ("close", True)
    assert lines == ["wandb: shown somewhere"]


def test_numbers_are_found_at_any_depth():
    nested = {"a": {"b": [1, {"c": "nan"}]}, "d": True, "e": "text", "f": None}
    found = flat(nested)
    assert sorted(found) == ["a/b/0", "a/b/1/c", "d"] and found["d"] == 1.0


def test_a_resumed_run_continues_without_repeating(tmp_path, tracker):
    process(tmp_path, 0, 5, complete=False)
    process(tmp_path, 3, 8)
    calls = tracker.calls[tmp_path.name]
    assert steps(calls) == list(range(9))
    opened = [call for call in calls if call[0] == "open"]
    assert [call[1] for call in opened] == [0, 3] and opened[0][2] == opened[1][2]
    assert [call for call in calls if call[0] == "close"] == [("close", False), ("close", True)]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == list(range(9))


def test_a_tracker_that_replaces_gets_the_repeated_steps(tmp_path, tracker):
    tracker.replaces = True
    process(tmp_path, 0, 5)
    process(tmp_path, 3, 6)
    assert steps(tracker.calls[tmp_path.name]) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]


def test_a_tracker_that_is_new_gets_the_earlier_steps(tmp_path, tracker):
    process(tmp_path, 0, 5, names=())
    process(tmp_path, 3, 6)
    assert steps(tracker.calls[tmp_path.name]) == list(range(7))


def test_controls_and_stages_are_series_of_their_own(tmp_path, tracker):
    (tmp_path / "quick" / "logs").mkdir(parents=True)
    trackers = Trackers(("wandb",), tmp_path / "quick", CONFIG, None, [].append)
    for name in ("student", "opd", "sft_teacher_default"):
        (tmp_path / name).mkdir()
        with Tracker(tmp_path / name, trackers.reporter(name)) as file:
            file.truncate(0)
            file.log(1, {"loss": 1.0})
    trackers.close(complete=True)
    assert list(tracker.calls) == ["quick", "quick-opd", "quick-sft_teacher_default"]
    assert all(steps(calls) == [1] for calls in tracker.calls.values())


def test_a_tracker_that_fails_is_turned_off_with_one_warning(tmp_path, tracker):
    tracker.failing = lambda step: step == 2
    lines = []
    process(tmp_path, 0, 5, lines)
    assert steps(tracker.calls[tmp_path.name]) == [0, 1]
    assert [line for line in lines if "warning" in line] == [
        "warning: wandb: ConnectionError: the network is gone; it is off from here on, "
        "metrics.jsonl has everything"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_tracker_that_hangs_does_not_hold_the_run(tmp_path, tracker, monkeypatch):
    release = threading.Event()
    tracker.failing = lambda step: release.wait() and False
    monkeypatch.setattr(reporting, "PATIENCE_S", 0.05)
    lines = []
    process(tmp_path, 0, 5, lines)
    release.set()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert any("has not finished" in line for line in lines)


def test_a_tracker_that_cannot_open_is_turned_off(tmp_path, tracker):
    def exits(series):
        raise SystemExit(1)

    tracker.open = exits
    lines = []
    process(tmp_path, 0, 3, lines)
    assert len([line for line in lines if "SystemExit" in line]) == 1


def test_a_full_disk_costs_the_run_nothing(tmp_path, tracker, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "write_atomically", full)
    lines = []
    process(tmp_path, 0, 2, lines)
    assert any("No space left" in line for line in lines)
    assert steps(tracker.calls[tmp_path.name]) == [0, 1, 2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_what_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError) as caught:
        check_installed((name,))
    assert str(caught.value).endswith(f'is not installed; pip install "fireopd-jax[{name}]"')
    check_installed(())


def test_trackers_are_a_list_a_name_or_none():
    teacher = "teacher.architecture.hidden_size=32"

    def given(text):
        return load_config([teacher, f"run.report_to={text}"]).run.report_to

    assert given("wandb") == ("wandb",) and given("none") == () and given("null") == ()
    assert given("[tensorboard, trackio]") == given("tensorboard,trackio")


@pytest.mark.parametrize("key", ["WANDB_API_KEY", "NETRC"])
def test_wandb_is_offline_where_no_key_is_found(tmp_path, monkeypatch, key):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    modes, line = wandb_runs.WandB().begin(tmp_path, None)
    assert modes == {"offline"} and f"wandb sync {tmp_path}/logs/wandb/offline-run-*" in line
    (tmp_path / "netrc").write_text("this is no netrc")
    assert wandb_runs.WandB().begin(tmp_path, None)[0] == {"offline"}
    if key == "NETRC":
        (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password 0123\n")
    else:
        monkeypatch.setenv(key, "0123")
    modes, line = wandb_runs.WandB().begin(tmp_path, "mine")
    assert modes == frozenset() and "project mine" in line
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_runs.WandB().begin(tmp_path, None)[0] == {"offline"}


def events(folder: Path):
    """Return (step, name, value) of every number in the event files, and the purges, in order."""
    from tensorboardX.proto import event_pb2

    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "purge", 0.0))
            for value in event.summary.value:
                found.append((event.step, value.tag, value.simple_value))
    return found


def test_event_files_of_tensorboard_are_continued(tmp_path):
    pytest.importorskip("tensorboardX")
    process(tmp_path, 0, 3, names=("tensorboard",))
    process(tmp_path, 2, 4, names=("tensorboard",))
    found = [e for e in events(tmp_path / "logs" / "tensorboard" / "student") if "/" not in e[1]]
    assert [(step, name) for step, name, _ in found] == [
        (0, "loss"), (1, "loss"), (2, "loss"), (3, "loss"),
        (2, "purge"), (2, "loss"), (3, "loss"), (4, "loss"),
    ]  # fmt: skip
    assert found[-1][2] == 2.0


def test_a_tensorboard_without_its_folder_is_turned_off(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tensorboard").write_text("a file is in the way")
    lines = []
    process(tmp_path, 0, 3, lines, names=("tensorboard",))
    assert len([line for line in lines if "it is off from here on" in line]) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_ones_take_a_resumed_run(tmp_path, monkeypatch, name):
    """Offline, in a database of their own; skipped where the package is not installed."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    lines = []
    process(tmp_path / "run", 0, 3, lines, names=(name,), complete=False)
    process(tmp_path / "run", 2, 4, lines, names=(name,))
    assert not [line for line in lines if "warning" in line], lines
    if name == "wandb":
        assert len(list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb"))) == 2
