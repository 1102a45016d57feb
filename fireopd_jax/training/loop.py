"""The host's side of training: dispatch step t, then report step t - 1.

    advance(state, step) -> state, metrics on the device   report(step, metrics) -> what to show

The device never waits for a report. A signal ends the loop between two steps, after a save.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from fireopd_jax.runs.tracking import progress
from fireopd_jax.runtime.signals import Interrupted, StopFlag

State = TypeVar("State")


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
