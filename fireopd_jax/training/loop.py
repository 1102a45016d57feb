"""The host loop of training: dispatch step t, then report step t - 1.

    for step in loop:  ...  loop.dispatched(step + 1, metrics)   -> report(step, metrics)

The device never waits for a report. A signal ends the loop between two steps, after a save.
"""

from collections.abc import Callable, Iterator
from typing import Any

from fireopd_jax.runtime.signals import Interrupted, StopFlag
from fireopd_jax.terminal.progress import Advance

Report = Callable[[int, Any], dict[str, object]]
"""(steps done, outputs of the step) -> values shown beside the progress."""


class StepLoop:
    """Iterates over the steps from `start` to `steps`, and reports each while the next one runs.

    A step is reported before it is saved, so that a run resumed from the checkpoint does not miss
    its report. `advance` is told of the steps of this loop; those before `start` are its caller's.
    """

    def __init__(
        self,
        label: str,
        start: int,
        steps: int,
        report: Report,
        *,
        stop: StopFlag,
        advance: Advance,
    ):
        self.label, self.start, self.steps = label, start, steps
        self._report, self._stop, self._advance = report, stop, advance
        self._pending: tuple[int, Any] | None = None
        self.stopping = False
        """Whether a signal has been received: the step dispatched last is the final one."""

    def __iter__(self) -> Iterator[int]:
        """Yield each step; raise `Interrupted` after the one in which a signal came."""
        for step in range(self.start, self.steps):
            yield step
            if self.stopping and step + 1 < self.steps:
                raise Interrupted(f"{self.label}: stopped after step {step + 1} of {self.steps}")
        self.flush()

    def dispatched(self, done: int, left: Any, *, flush: bool = False) -> None:
        """Report the previous step; with `flush` or after a signal, wait for this one, too.

        `left` are the outputs of step `done`, passed to the report.
        """
        self.flush()
        self._pending = (done, left)
        self.stopping = bool(self._stop)
        if flush or self.stopping:
            self.flush()

    def flush(self) -> None:
        """Report the pending step, if any."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._advance(1, **self._report(*pending))
