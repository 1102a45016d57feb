"""Progress of a loop on stderr, and in the log of a run.

    with progress(label, total) as advance:  advance(1, loss=0.3)

This module does not import JAX.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from fireopd_jax.terminal.meter import Meter
from fireopd_jax.terminal.record import keep
from fireopd_jax.terminal.screen import Screen, is_live, screen

PLAIN_INTERVAL_S = 10.0
FIRST_LINE_S = 0.5
"""A loop that ends before has one line, its last."""
BARS = {True: "━─", False: "#-"}


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
    start: int = 0,
    interactive: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
    on: Screen | None = None,
) -> Iterator[Advance]:
    """Show a loop's progress on stderr: a live line on a terminal, else a line every ten seconds.

    `start` units were done before, such as by the run that this one resumes. The plain lines are
    kept for the log of the run in both cases. `on` is the screen, by default stderr.
    """
    live = is_live(sys.stderr) if interactive is None else interactive
    loop = _Loop(Meter(label, total, start, clock), clock, None if not live else on or screen())
    with loop.screen.showing(loop) if loop.screen else nullcontext():
        try:
            yield loop.advance
        finally:
            loop.end()


class _Loop:
    """A loop on the live line, or in plain lines where there is no screen."""

    def __init__(self, meter: Meter, clock: Callable[[], float], screen: Screen | None):
        self.meter, self.screen, self._clock = meter, screen, clock
        self._printed, self._printed_at = -1, float("-inf")

    def advance(self, n: int = 1, **shown: object) -> None:
        self.meter.add(n, shown)
        now = self._clock()
        began = now - self.meter.began >= FIRST_LINE_S
        if n and began and now - self._printed_at >= PLAIN_INTERVAL_S:
            self._print()

    def end(self) -> None:
        if self._printed != self.meter.done:
            self._print()
        if self.screen is not None:
            self.screen.leave(self)

    def _print(self) -> None:
        self._printed, self._printed_at = self.meter.done, self._clock()
        plain_line(self.meter.plain(), self.screen is None)

    def line(self, width: int, unicode: bool) -> str:
        return self.meter.line(width, BARS[unicode])

    def short(self) -> str:
        return f"{self.meter.label} {self.meter.count()}"


def plain_line(text: str, shown: bool = True) -> None:
    """Keep a line, and print it with the time to stderr if it is `shown` there."""
    keep(text)
    if shown:
        print(f"{time_of_day()} {text}", file=sys.stderr, flush=True)


def time_of_day() -> str:
    """Return the time as HH:MM:SS."""
    return time.strftime("%H:%M:%S")
