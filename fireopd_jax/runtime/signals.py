"""SIGINT and SIGTERM as a flag that a loop looks at between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The user asked the run to stop; everything up to the last step has been saved."""


class StopFlag:
    """True once SIGINT or SIGTERM has come; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __call__(self, number: int, _: object) -> None:
        """Take a signal."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Catch the signals while the block runs (in the main thread; elsewhere they are not ours)."""
    flag = StopFlag()
    old = {}
    ours = threading.current_thread() is threading.main_thread()
    try:
        for number in (signal.SIGINT, signal.SIGTERM) if ours else ():
            old[number] = signal.signal(number, flag)
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
