"""The trackers of a run: what is written to metrics.jsonl goes to them too, and costs nothing.

    run.report_to -> check_installed -> Trackers -> Reporter of each series -> writers, on a thread

metrics.jsonl is the truth: a tracker that raises, hangs or has lost its network or disk is turned
off with one warning, and the run goes on. A resumed run continues the same series: the steps that
it writes again are not reported twice, and a tracker that is new gets the earlier steps from the
file. This module does not import JAX.
"""

import dataclasses
import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.runs.trackers.base import MAIN, Series, Tracker, Writer
from fireopd_jax.runs.trackers.event_files import TensorBoard
from fireopd_jax.runs.trackers.trackio_runs import Trackio
from fireopd_jax.runs.trackers.wandb_runs import WandB
from fireopd_jax.runtime.files import write_atomically
from fireopd_jax.runtime.limits import parse_json

TRACKERS: dict[str, Tracker] = {
    "tensorboard": TensorBoard(),
    "wandb": WandB(),
    "trackio": Trackio(),
}
PATIENCE_S = 75.0
"""Seconds to wait for a tracker at the end of a run; longer than any of their own limits."""
STOPPED_S = 15.0
"""The same for a run that was stopped."""
SAMPLES = 8
"""Responses in a table."""

Values = Mapping[str, Any]
Record = tuple[int, Values]
"""A line of metrics.jsonl: step and values."""
Seen = frozenset[tuple[int, str]]
"""Steps and names of numbers that an earlier process has reported."""


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError for the first tracker whose package is not installed."""
    for name in names:
        if missing := TRACKERS[name].missing():
            extra = TRACKERS[name].extra
            raise UserError(
                f"run.report_to={name}: {missing} is not installed; "
                f'pip install "fireopd-jax[{extra}]"'
            )


class Worker:
    """Runs the calls of one tracker in order, on a daemon thread, until one raises."""

    def __init__(self, name: str):
        self.name, self.failure, self.failed = name, "", False
        self.notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Lines for the log, which the main thread writes."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """Queue a call; dropped once one has failed."""
        if not self.failed:
            self._calls.put(call)

    def close(self, seconds: float) -> None:
        """Wait until all calls are done, for so many seconds at most."""
        self._calls.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive() and not self.failed:
            self._fail(f"has not finished after {seconds:.0f} s")

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self.failed:
                continue
            try:
                call()
            except BaseException as error:  # a tracker's SystemExit must not pass unseen either
                self._fail(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _fail(self, reason: str) -> None:
        self.failed = True
        self.notices.put(
            f"warning: {self.name}: {reason}; it is off from here on, metrics.jsonl has everything"
        )


class Reporter:
    """One series of the run, on every tracker."""

    def __init__(self, trackers: "Trackers", name: str):
        self._trackers, self.name = trackers, name
        self._writers: dict[str, Writer] = {}
        self._seen: Seen = frozenset()
        self.begun = False

    def begin(self, first: int, before: Sequence[Record], dropped: Sequence[Record]) -> None:
        """Open the series, whose next step is `first`.

        A tracker without the records `before` that step gets them; those that are `dropped` were
        reported by an earlier process, and are not reported again.
        """
        self.begun = True
        self._seen = frozenset((step, key) for step, values in dropped for key in flat(values))
        for name, worker in self._trackers.workers.items():
            worker.put(self._opening(name, worker, first, before))
        self._trackers.remember(self.name)

    def log(self, step: int, values: Values) -> None:
        """Report the numbers of a step."""
        numbers = flat(values)

        def write(writer: Writer, seen: Seen) -> None:
            if fresh := {key: x for key, x in numbers.items() if (step, key) not in seen}:
                writer.log(step, fresh)

        self._each(write)

    def table(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Report some sampled responses: the first `SAMPLES` of rows with texts by column."""
        columns = ("prompt", "response", "answer", "correct", "teacher")
        shown = [row for _, row in zip(range(SAMPLES), rows, strict=False)]
        texts = [["" if row.get(c) is None else str(row[c]) for c in columns] for row in shown]
        if texts:
            self._each(lambda writer, seen: writer.table(step, columns, texts))

    def summary(self, step: int, values: Values) -> None:
        """Report the results of the run."""
        numbers = flat(values)
        self._each(lambda writer, seen: writer.summary(step, numbers))

    def close(self, complete: bool) -> None:
        """Close the writers."""
        self._each(lambda writer, seen: writer.close(complete))

    def _opening(
        self, name: str, worker: Worker, first: int, before: Sequence[Record]
    ) -> Callable[[], None]:
        series = self._trackers.series(name, self.name, first)

        def opening() -> None:
            options = self._trackers.options[name]
            now = dataclasses.replace(series, options=options)
            writer = self._writers[name] = TRACKERS[name].open(now)
            if notice := getattr(writer, "notice", ""):
                worker.notices.put(f"{name}: {notice}")
                # Later series need not try in vain again.
                self._trackers.options[name] = options | {"offline"}
            if not writer.kept:
                for step, values in before:
                    writer.log(step, flat(values))

        return opening

    def _each(self, call: Callable[[Writer, Seen], None]) -> None:
        for name, worker in self._trackers.workers.items():
            worker.put(lambda name=name: self._call(name, call))
        self._trackers.show_notices()

    def _call(self, name: str, call: Callable[[Writer, Seen], None]) -> None:
        writer = self._writers[name]
        call(writer, self._seen if writer.kept and not writer.replaces else frozenset())


class Trackers:
    """The trackers of a run."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
        project: str | None,
        log: Callable[[str], None],
    ):
        self.folder, self.config, self.project, self._log = folder, config, project, log
        self.workers = {name: Worker(name) for name in dict.fromkeys(names)}
        self.options: dict[str, frozenset[str]] = {}
        """Modes of each tracker, such as `offline`."""
        self._reporters: dict[str, Reporter] = {}
        self._state_file = folder / "logs" / "trackers.json"
        self._state = self._read_state() if names else {}
        for name in self.workers:
            self.options[name], line = TRACKERS[name].begin(folder, project)
            log(f"{name}: {line}")

    @classmethod
    def none(cls) -> "Trackers":
        """Return no trackers."""
        return cls((), Path(), {}, None, print)

    def reporter(self, name: str) -> Reporter | None:
        """Return the reporter of a series, None without trackers."""
        if not self.workers:
            return None
        return self._reporters.setdefault(name, Reporter(self, name))

    def series(self, tracker: str, name: str, first: int) -> Series:
        """Return a series as a tracker opens it."""
        return Series(
            name=name,
            folder=self.folder,
            run_id=self._state["id"],
            project=self.project,
            config=self.config,
            first=first,
            known=name in self._state["series"].get(tracker, []),
        )

    def remember(self, name: str) -> None:
        """Record that the trackers have a series."""
        for tracker in self.workers:
            known = self._state["series"].setdefault(tracker, [])
            if name not in known:
                known.append(name)
        try:
            write_atomically(self._state_file, json.dumps(self._state) + "\n")
        except OSError as error:
            self._log(f"warning: {self._state_file}: {error.strerror}; a resumed run reports anew")

    def summary(self, step: int, values: Values) -> None:
        """Report the results of the run after its last step, with its student."""
        if (reporter := self.reporter(MAIN)) is None:
            return
        if not reporter.begun:  # trained by an earlier process
            reporter.begin(step + 1, (), ())
        reporter.summary(step, values)

    def close(self, complete: bool) -> None:
        """Close every series, and wait for the trackers, but not for ever."""
        for reporter in self._reporters.values():
            reporter.close(complete)
        for worker in self.workers.values():
            worker.close(PATIENCE_S if complete else STOPPED_S)
        self.show_notices()

    def __enter__(self) -> "Trackers":
        """Return the trackers themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close every series; an exception marks the run as stopped."""
        self.close(complete=kind is None)

    def show_notices(self) -> None:
        """Log what the trackers have reported since the last call."""
        for worker in self.workers.values():
            while not worker.notices.empty():
                self._log(worker.notices.get())

    def _read_state(self) -> dict[str, Any]:
        try:
            state = parse_json(self._state_file.read_text(encoding="utf-8"))
            if isinstance(state["id"], str) and isinstance(state["series"], dict):
                return state
        except FileNotFoundError:
            pass  # of a new run
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._log(f"warning: {self._state_file}: damaged ({error}); the series begin anew")
        return {"id": uuid.uuid4().hex[:8], "series": {}}


def flat(values: Values, prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested values, with their paths as names; texts are left out."""
    out: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flat(value, f"{name}/")
        elif isinstance(value, list | tuple):
            out |= flat({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, str):
            if value in ("nan", "inf", "-inf"):
                out[name] = float(value)
        elif value is not None:
            out[name] = float(value)
    return out
