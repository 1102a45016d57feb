"""The host's side of training: dispatch step t, then report step t - 1.

    advance(state, step) -> state, metrics on the device   report(step, metrics) -> what to show

The device never waits for a report. A signal ends the loop between two steps, after a save.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fireopd_jax.tracking import progress

State = TypeVar("State")


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


def run_steps(
    label: str,
    state: State,
    start: int,
    steps: int,
    advance: Callable[[State, int], tuple[State, Any]],
    report: Callable[[int, Any], dict[str, object]],
    after: Callable[[int, State, bool], None],
    stop: StopFlag,
    saves: Callable[[int], bool] = lambda done: False,
    enough: Callable[[int], bool] = lambda done: False,
) -> State:
    """Run steps `start` to `steps`; `after(done, state, last)` may save and evaluate.

    A step that `saves` names is reported before `after`: a run that goes on from there writes no
    report of it again. `enough(done)` ends
    the loop early, judged by the reports of the steps before `done`.
    Raises `Interrupted` when a signal came, after `after` was told that this step is the last.
    """
    pending: tuple[int, Any] | None = None
    with progress(label, steps) as bar:
        bar(start)
        for step in range(start, steps):
            if enough(step):
                break
            state, metrics = advance(state, step)
            if pending is not None:
                bar(1, **report(*pending))
            pending = (step + 1, metrics)
            stopping = bool(stop)
            if stopping or saves(step + 1):
                bar(1, **report(*pending))
                pending = None
            after(step + 1, state, stopping)
            if stopping and step + 1 < steps:
                raise Interrupted(f"{label}: stopped after step {step + 1} of {steps}")
        if pending is not None:
            bar(1, **report(*pending))
    return state
