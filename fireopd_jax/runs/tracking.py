"""Metrics in metrics.jsonl, and progress, log lines, tables and curves on the terminal.

    {"loss": 0.4, ...} -> Tracker -> metrics.jsonl -> history -> curve
    progress, Log, table -> terminal

Non-finite numbers are written to metrics.jsonl as the strings "nan", "inf" or "-inf", so that
every line is valid JSON; `history` returns them as floats. This module does not import JAX.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fireopd_jax.runs.folder import plain, write_atomically

Points = Sequence[tuple[int, int | float]]

MARKERS = "●○▲△■□"
PLAIN_INTERVAL_S = 10.0
TIME = "%Y-%m-%d %H:%M:%S"
PACKAGE = logging.getLogger("fireopd_jax")
# Without a terminal rich assumes 80 columns and wraps cells; a file needs no such limit.
FILE_WIDTH = 140


class Tracker:
    """Appends to `folder/metrics.jsonl`, one line per call."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        # Drop a line cut off by a kill: the next line would be appended to it.
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._rewrite(inf)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the values of a step."""
        line = json.dumps(plain({"step": step, **values}), allow_nan=False)
        self._file.write(line + "\n")

    def truncate(self, step: int) -> None:
        """Remove the lines from `step` on; a resumed run writes them again."""
        self._file.close()
        self._rewrite(step)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return every (step, value) of a key, in the order of the file."""
        records = map(json.loads, self._lines(inf))
        return [
            (record["step"], float(record[key]))
            for record in records
            if record.get(key) is not None
        ]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Tracker":
        """Return the tracker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _lines(self, end: int | float) -> Iterator[str]:
        """Yield the valid lines of the steps before `end`."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] < end:
                    yield line
            except (json.JSONDecodeError, KeyError, TypeError):
                continue

    def _rewrite(self, end: int | float) -> None:
        write_atomically(self.path, "".join(f"{line}\n" for line in self._lines(end)))


class Log:
    """Prints lines and appends them, with the time, to `folder/run.log`, as warnings of modules."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "run.log").open("a", buffering=1, encoding="utf-8")
        self._handler = logging.StreamHandler(self._file)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
        PACKAGE.addHandler(self._handler)

    def __call__(self, text: str) -> None:
        """Print the text and append it to the log file."""
        print(text, flush=True)
        now = time.strftime(TIME)
        self._file.writelines(f"{now} {line}\n" for line in text.splitlines())

    def close(self) -> None:
        """Close the file."""
        PACKAGE.removeHandler(self._handler)
        self._file.close()

    def __enter__(self) -> "Log":
        """Return the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


@runtime_checkable
class Advance(Protocol):
    """Advances a progress display."""

    def __call__(self, n: int = 1, **shown: object) -> None:
        """Add `n` to the count of done units; `shown` are values displayed beside it."""
        ...


@contextmanager
def progress(
    label: str,
    total: int,
    *,
    interactive: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
    """Show a loop's progress on stderr: a live bar on a terminal, else a line every ten seconds."""
    live = sys.stderr.isatty() if interactive is None else interactive
    with _bar(label, total, clock) if live else _plain_lines(label, total, clock) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, clock: Callable[[], float]) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    # Rich would redirect stdout to stderr, which is right for a terminal only.
    bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
    start, done = clock(), 0
    with bar:
        task = bar.add_task(label, total=total, rate="", shown="")

        def advance(n: int = 1, **shown: object) -> None:
            nonlocal done
            done += n
            rate = _rate(done, clock() - start)
            bar.update(task, completed=done, rate=rate, shown=_pairs(shown))

        yield advance


@contextmanager
def _plain_lines(label: str, total: int, clock: Callable[[], float]) -> Iterator[Advance]:
    start = printed_at = clock()
    done, printed = 0, -1
    last: dict[str, object] = {}

    def print_line() -> None:
        nonlocal printed_at, printed
        printed_at, printed = clock(), done
        parts = (f"{label} {done}/{total}", _rate(done, printed_at - start), _pairs(last))
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def advance(n: int = 1, **shown: object) -> None:
        nonlocal done, last
        done, last = done + n, shown
        if clock() - printed_at >= PLAIN_INTERVAL_S:
            print_line()

    try:
        yield advance
    finally:
        if printed != done:
            print_line()


def _rate(done: int, seconds: float) -> str:
    if done == 0 or seconds <= 0:
        return ""
    rate = done / seconds
    return f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it"


def _pairs(shown: Mapping[str, object]) -> str:
    return "  ".join(f"{name} {_cell(value)}" for name, value in shown.items())


def _cell(value: object) -> str:
    value = plain(value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(
    rows: Sequence[Sequence[object]], columns: Sequence[str], *, title: str | None = None
) -> None:
    """Print a table to stdout; columns of numbers are right-aligned."""
    printed = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        numbers = all(isinstance(plain(row[index]), int | float | None) for row in rows)
        printed.add_column(name, justify="right" if rows and numbers else "left")
    for row in rows:
        # Not as rich markup: a cell such as "[a]" is text.
        printed.add_row(*(_cell(value).replace("[", r"\[") for value in row))
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(printed)


def curve(
    points: Points | Mapping[str, Points], title: str, width: int = 60, height: int = 12
) -> str:
    """Return learning curves as a text plot, values over steps, with a marker for each series.

    Non-finite values are left out.
    """
    series = dict(points) if isinstance(points, Mapping) else {"": points}
    series = {
        name: [(step, value) for step, value in line if isfinite(value)]
        for name, line in series.items()
    }
    every = [point for line in series.values() for point in line]
    if not every:
        return f"{title}\n(no points)"
    left, right = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    canvas = [[" "] * width for _ in range(height)]
    for index, line in enumerate(series.values()):
        for step, value in line:
            # A constant series is drawn in the middle.
            up = (value - low) / (high - low) if high > low else 0.5
            along = (step - left) / (right - left) if right > left else 0.0
            row, column = round((1 - up) * (height - 1)), round(along * (width - 1))
            canvas[row][column] = MARKERS[index % len(MARKERS)]
    labels = [f"{low + (high - low) * (1 - row / max(1, height - 1)):.4g}" for row in range(height)]
    # Label only the top, the middle and the bottom row.
    named = {0, height // 2, height - 1} if high > low else {(height - 1) // 2}
    margin = max(len(labels[row]) for row in named)
    lines = [title] if title else []
    for row in range(height):
        label, axis = (labels[row], "┤") if row in named else ("", "│")
        lines.append(f"{label:>{margin}} {axis}{''.join(canvas[row]).rstrip()}")
    lines.append(f"{'':>{margin}} └{'─' * width}")
    ends = f"{left}{right:>{max(1, width - len(str(left)))}}" if right > left else f"{left}"
    lines.append(f"{'':>{margin}}  {ends}  step")
    if len(series) > 1:
        names = (f"{MARKERS[i % len(MARKERS)]} {name}" for i, name in enumerate(series))
        lines.append(f"{'':>{margin}}  {'   '.join(names)}")
    return "\n".join(lines)
