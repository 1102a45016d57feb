"""Progress of a loop on stderr.

    with progress(label, total) as advance:  advance(1, loss=0.3)

This module does not import JAX.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fireopd_jax.terminal.tables import cell

PLAIN_INTERVAL_S = 10.0


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
    return "  ".join(f"{name} {cell(value)}" for name, value in shown.items())
