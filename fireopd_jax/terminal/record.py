"""Everything that a run shows, for its log file: the file first, then the screen.

    with recording():  ...  say("fireopd 1.0")        kept, until a log takes it
                       attach(write) -> the kept lines, then each line as it comes

A line is kept with the time at which it was shown. Nothing here waits for a lock, so that a signal
handler may keep a line, too.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fireopd_jax.terminal.safe import safe

Write = Callable[[float, str], None]
"""(seconds since the epoch, text of one or more lines) -> None."""

HELD = 2000
"""Maximum number of texts that are held before a log takes them."""


class Record:
    """What has been shown: passed on to the attached log, or held until there is one."""

    def __init__(self) -> None:
        self.texts = 0
        """Number of texts so far."""
        self.write: Write | None = None
        self._held: deque[tuple[float, str]] = deque(maxlen=HELD)

    def __call__(self, text: str) -> None:
        """Keep a text with the time."""
        self.texts += 1
        if self.write is None:
            self._held.append((time.time(), text))
        else:
            self.write(time.time(), text)

    def pass_on(self) -> None:
        """Write what was held to the log."""
        while self._held and self.write is not None:
            self.write(*self._held.popleft())


_records: list[Record] = []


@contextmanager
def recording() -> Iterator[Record]:
    """Keep what is shown inside the block, warnings included; inside another one, go on with it."""
    if _records:
        yield _records[-1]
        return
    _records.append(Record())
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        keep(f"{filename}:{lineno}: {category.__name__}: {message}")
        shown(message, category, filename, lineno, *rest)

    warnings.showwarning = show
    try:
        yield _records[-1]
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = shown
        _records.pop()


@contextmanager
def attach(write: Write) -> Iterator[None]:
    """Pass what is kept to `write` inside the block: first what was shown before it."""
    with recording() as record:
        before, record.write = record.write, write
        try:
            record.pass_on()
            yield
        finally:
            record.write = before


def keep(text: str) -> None:
    """Keep a text that is shown elsewhere, if a run is being recorded."""
    if _records:
        _records[-1](safe(text))


def say(text: str) -> None:
    """Keep a text, and print it to stdout."""
    keep(text)
    print(safe(text), flush=True)
