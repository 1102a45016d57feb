"""One thread that owns the device: it samples responses and scores sequences.

    HTTP handlers -> submit -> [generations | scorings] -> worker thread -> futures

Requests that arrive while others are decoded join them at the next pause of the engine, where the
waiting sequences are scored, too.
"""

import dataclasses
import hashlib
import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Int32

from fireopd_jax.rollout.requests import Completion, Knobs, Request
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.serving.errors import ApiError, busy, given_up, stopping
from fireopd_jax.serving.scorer import Scored, Scorer, ScoreRequest

IDS = 2**31
"""Request ids are below this."""


@dataclasses.dataclass(eq=False)
class Generation:
    """Samples of one prompt."""

    prompt: Int32[np.ndarray, " P"]
    knobs: Knobs
    ids: Sequence[int]
    """Request ids, which seed the samples: one for each."""
    future: Future[list[Completion]] = dataclasses.field(default_factory=Future)
    abandoned: bool = False
    """Whether the client has gone."""
    done: dict[int, Completion] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.ids)


@dataclasses.dataclass(eq=False)
class Scoring:
    """A sequence to score."""

    request: ScoreRequest
    future: Future[Scored] = dataclasses.field(default_factory=Future)
    abandoned: bool = False

    @property
    def size(self) -> int:
        """Number of sequences."""
        return 1


Job = Generation | Scoring


class SampleIds:
    """Request ids: a function of seed, prompt and sample, or never used before without a seed."""

    def __init__(self) -> None:
        self._next = itertools.count(secrets.randbelow(IDS))

    def __call__(self, prompt: Int32[np.ndarray, " P"], count: int, seed: int | None) -> list[int]:
        """Return `count` distinct ids."""
        if seed is None:
            return [next(self._next) % IDS for _ in range(count)]
        ids: dict[int, None] = {}
        text = prompt.astype("<i4").tobytes()
        for attempt in itertools.count():
            if len(ids) == count:
                return list(ids)
            digest = hashlib.sha256(f"{seed}/{attempt}/".encode() + text).digest()
            ids[int.from_bytes(digest[:4], "little") % IDS] = None
        raise AssertionError  # unreachable: the loop has no end


class Worker:
    """The thread, its queues, and the jobs that are open."""

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        limit: int,
        report: Callable[[BaseException], None] = lambda error: None,
    ):
        """Accept up to `limit` sequences at a time; `report` is told of failures of the device."""
        self.engine, self.scorer, self.limit, self.report = engine, scorer, limit, report
        self.size = 0
        """Sequences that are accepted and not answered."""
        self._change = threading.Condition()
        self._generations: deque[Generation] = deque()
        self._scorings: deque[Scoring] = deque()
        self._held: list[Generation] = []
        self._open: dict[int, Generation] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="fireopd-serve", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what is open, and wait for the thread to end."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        self._thread.join()

    def submit(
        self,
        generations: Sequence[Generation] = (),
        scorings: Sequence[Scoring] = (),
        *,
        follow_up: bool = False,
    ) -> None:
        """Queue jobs, all of them or none; their futures hold the answers.

        Raises ApiError if the queue is full, except for a follow-up of work that was accepted.
        """
        jobs: list[Job] = [*generations, *scorings]
        size = sum(job.size for job in jobs)
        with self._change:
            if self._stopping:
                raise stopping()
            if not follow_up and size > self.limit:
                raise ApiError(
                    400,
                    f"the request asks for {size} responses or scores (prompts x n); the server's "
                    f"queue has room for {self.limit}",
                    code="queue_too_small",
                )
            if not follow_up and self.size + size > self.limit:
                raise busy(self.limit)
            self.size += size
            for job in jobs:
                # Running from the start: a handler that is cancelled cannot cancel the future.
                job.future.set_running_or_notify_cancel()
                job.future.add_done_callback(lambda _, size=job.size: self._answered(size))
            self._generations.extend(generations)
            self._scorings.extend(scorings)
            self._change.notify_all()

    def _answered(self, size: int) -> None:
        with self._change:
            self.size -= size

    # -- in the thread

    def _work(self) -> None:
        while self._wait():
            try:
                for completion in self.engine.stream([], feed=self):
                    self._deliver(completion)
            except _Stopped:
                break
            except Exception as error:
                self.report(error)
                reason = ApiError(500, f"the device failed: {type(error).__name__}: {error}")
                self._fail(list(dict.fromkeys(self._open.values())), reason)
                self._open.clear()
        with self._change:
            left = [*self._generations, *self._scorings]
            self._generations.clear()
            self._scorings.clear()
        self._fail([*dict.fromkeys(self._open.values()), *self._held, *left], stopping())

    def _wait(self) -> bool:
        """Wait for work; return False when the worker stops."""
        with self._change:
            while not (self._stopping or self._generations or self._scorings or self._held):
                self._change.wait()
            return not self._stopping

    def arriving(self) -> Iterable[Request]:
        """Score the waiting sequences; return the new requests (see `Feed`).

        A request whose id is being sampled already, such as a repeated one with the same seed,
        waits for it.
        """
        if self._stopping:
            raise _Stopped
        self._score()
        with self._change:
            self._held += self._generations
            self._generations.clear()
        held, requests = [], []
        for job in self._held:
            if job.abandoned:
                self._fail([job], given_up())
            elif any(each in self._open for each in job.ids):
                held.append(job)
            else:
                self._open |= dict.fromkeys(job.ids, job)
                requests += [Request(each, job.prompt, job.knobs) for each in job.ids]
        self._held = held
        return requests

    def abandoned(self) -> Collection[int]:
        """Return the ids of requests that no client waits for any more (see `Feed`)."""
        gone = [each for each, job in self._open.items() if job.abandoned]
        self._fail([self._open.pop(each) for each in gone], given_up())
        return gone

    def _score(self) -> None:
        with self._change:
            jobs = list(self._scorings)
            self._scorings.clear()
        self._fail([job for job in jobs if job.abandoned], given_up())
        jobs = [job for job in jobs if not job.abandoned]
        try:
            for job, scored in zip(
                jobs, self.scorer.score([job.request for job in jobs]), strict=True
            ):
                job.future.set_result(scored)
        except Exception as error:
            self.report(error)
            reason = ApiError(500, f"the device failed: {type(error).__name__}: {error}")
            self._fail([job for job in jobs if not job.future.done()], reason)

    def _deliver(self, completion: Completion) -> None:
        job = self._open.pop(completion.id)
        job.done[completion.id] = completion
        if len(job.done) == job.size:
            job.future.set_result([job.done[each] for each in job.ids])

    def _fail(self, jobs: Iterable[Job], error: ApiError) -> None:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)


class _Stopped(Exception):
    """Leaves the engine's stream when the server stops."""
