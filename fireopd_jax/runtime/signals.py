"""Signals as a flag that a loop checks between two steps.

    SIGINT, SIGTERM, SIGHUP -> StopFlag is true -> the loop saves, then raises Interrupted
                            -> on_stop(number), at once, by a thread: also while a program compiles

Outside of such loops (`held`) there is nothing to save, and a signal interrupts at once. A second
SIGINT interrupts the step that is computed; a third one ends the process where it is. Files are
renamed when they are whole, so that none of it leaves half a file.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fireopd_jax.runtime.processes import any_of_all

OnStop = Callable[[int], None]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST = 3
"""The SIGINT that ends the process at once."""


class Interrupted(BaseException):
    """The user asked the run to stop; everything up to the last step has been saved.

    As KeyboardInterrupt no `Exception`: what catches any fault of a file or a function of a
    user's must not take it for one.
    """


class StopFlag:
    """True after the first signal; a SIGINT after it raises KeyboardInterrupt.

    `eager`: outside of `held` the first signal raises `Interrupted`. `on_stop` is called with the
    number of the first signal, by a thread, at most once.
    """

    def __init__(self, on_stop: OnStop | None = None, eager: bool = False):
        self.signal: int | None = None
        self.on_stop, self.eager = on_stop, eager
        self._held = self._saving = 0
        self._postponed = False

    def __bool__(self) -> bool:
        """Whether a signal came, to any process of the run: all of them ask at the same places."""
        return any_of_all(self.signal is not None)

    def __call__(self, number: int, _: object) -> None:
        """Record a signal, and raise what it asks for."""
        if self.signal is None:
            self.signal = number
            if self.eager and not self._held:
                raise Interrupted(f"stopped by {signal.Signals(number).name}")
        elif number == signal.SIGINT:  # a closed terminal or a scheduler sends others twice
            if self._saving:
                self._postponed = True
            else:
                raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block the first signal is only recorded: the block looks at the flag."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside the block a second SIGINT waits for its end, too: something is being saved."""
        self._saving += 1
        try:
            with self.held():
                yield
        finally:
            self._saving -= 1
        if self._postponed and not self._saving:
            self._postponed = False
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise `Interrupted` if a signal has been recorded."""
        if self.signal is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.signal).name}")


@contextmanager
def stop_on_signal(on_stop: OnStop | None = None, *, eager: bool = False) -> Iterator[StopFlag]:
    """Catch SIGINT, SIGTERM and SIGHUP inside the block, and restore the old handlers after it.

    A SIGHUP that is ignored, as `nohup` does it, stays ignored. Only the main thread may install
    handlers; in any other thread nothing is caught.
    """
    flag = StopFlag(on_stop, eager)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    old = {}
    with _watched(flag):
        try:
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    old[number] = signal.signal(number, flag)
            yield flag
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextmanager
def _watched(flag: StopFlag) -> Iterator[None]:
    """Watch the signals in a thread, which Python's own handlers would let wait for a program."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, flag), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int, flag: StopFlag) -> None:
    stopped, interrupts = False, 0
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number not in SIGNALS:
                continue
            interrupts += number == signal.SIGINT
            if interrupts == LAST:
                os._exit(128 + number)
            if not stopped and flag.on_stop is not None:
                # A line that cannot be shown must not end the thread: it counts the signals.
                with contextlib.suppress(Exception):
                    flag.on_stop(number)
            stopped = True
