"""SIGINT and SIGTERM as a flag that a loop checks between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The user asked the run to stop; everything up to the last step has been saved."""


class StopFlag:
    """True after the first SIGINT or SIGTERM; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __call__(self, number: int, _: object) -> None:
        """Record a signal; the second one raises KeyboardInterrupt."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Catch SIGINT and SIGTERM inside the block, and restore the old handlers after it.

    Only the main thread may install handlers; in any other thread nothing is caught.
    """
    flag = StopFlag()
    old = {}
    is_main = threading.current_thread() is threading.main_thread()
    try:
        for number in (signal.SIGINT, signal.SIGTERM) if is_main else ():
            old[number] = signal.signal(number, flag)
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
