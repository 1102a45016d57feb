"""Seconds of each stage of a step, measured without holding up the host.

    with clock.stage("rollout") as ready:  out = program(...);  ready(out.finished)
    clock.next()                           # the stages that follow belong to the next step
    clock.take(step) -> {"rollout": 1.2, "compile": 0.0, ...}

The host only dispatches. A thread of its own waits for one small output of each stage, in the order
of their dispatch, in which the device runs them: a stage takes from the end of the stage before it
(or from its dispatch, if the device was idle) to its own end. The dispatch of a program that was
traced and compiled is counted as `compile`.
"""

import contextlib
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.types import Array


class StageClock:
    """Sums seconds by stage and step. Use as a context manager: it owns a thread."""

    def __init__(self, step: int = 0, clock: Callable[[], float] = time.monotonic):
        self.step = step
        self._clock = clock
        self._compiled = CompileCounter()
        self._seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        self._waiting: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[tuple[int, str, float, Array] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="stage-clock", daemon=True)
        self.totals: dict[str, float] = {}
        """Of all steps that were taken."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[Array], None]]:
        """Dispatch a stage in the block, then pass one of its outputs that nobody donates."""
        start, count = self._clock(), self._compiled.count

        def ready(output: Array) -> None:
            now = self._clock()
            compiled = now - start if self._compiled.count > count else 0.0
            with self._changed:
                self._seconds[self.step]["compile"] += compiled
                self._waiting[self.step] += 1
            self._queue.put((self.step, name, start + compiled, output))

        yield ready

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time work that the host does, or waits for."""
        start = self._clock()
        yield
        with self._changed:
            self._seconds[self.step][name] += self._clock() - start

    def next(self) -> None:
        """Count what follows to the next step."""
        self.step += 1

    def take(self, step: int) -> dict[str, float]:
        """Return the seconds of a step's stages; waits until the device has ended them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting[step])
            taken = dict(self._seconds.pop(step, {}))
        for name, seconds in taken.items():
            self.totals[name] = self.totals.get(name, 0.0) + seconds
        return taken

    def _watch(self) -> None:
        free = 0.0  # when the device ended the stage before
        while (entry := self._queue.get()) is not None:
            step, name, start, output = entry
            with contextlib.suppress(Exception):  # the host meets a failed program itself
                jax.block_until_ready(output)
            end = self._clock()
            with self._changed:
                self._seconds[step][name] += max(0.0, end - max(free, start))
                self._waiting[step] -= 1
                self._changed.notify_all()
            free = end

    def __enter__(self) -> "StageClock":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End it; after a KeyboardInterrupt without waiting for what the device computes."""
        self._queue.put(None)
        if kind is not KeyboardInterrupt:
            self._thread.join()
