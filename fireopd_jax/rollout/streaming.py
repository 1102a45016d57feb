"""Continuous batching on the host: requests arrive at any time, responses leave when they end.

    pending -> write to the table -> [run `chunk_steps` -> fetch finished rows -> refill]* ->
    Completion

The device holds the request table, the queue and the slots (`state.EngineState`). Between two
bounded runs the host only refills the table and fetches the rows that have ended. Each replica of
the mesh has its own table and loop. `Engine.load` compiles every program, one for each size that
the KV cache may grow to.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine_programs import EnginePrograms, blank_requests, capacities
from fireopd_jax.rollout.layouts import AUTO, CacheLayout, layout_of
from fireopd_jax.rollout.meshes import replica_count
from fireopd_jax.rollout.requests import (
    OF_TOKENS,
    Budget,
    Completion,
    Feed,
    Request,
    check_request,
    cut_at_stop_string,
    empty,
    padded_stop,
)
from fireopd_jax.rollout.state import FINISH, RUNNING, EngineState, Requests, Shape
from fireopd_jax.rollout.statistics import Statistics

NO_BUDGET = Budget()
BLOCK = 64
"""Requests that are written to a replica's table, or fetched from it, in one call."""
Place = tuple[int, int]
"""Replica, and row of its request table."""


class Engine:
    """Samples responses to requests from one model."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        width: int,
        room: int,
        seed: int,
        slots: int | None = None,
        rows: int | None = None,
        context: int | None = None,
        memory: CacheLayout = AUTO,
        chunk_steps: int = 64,
        text: Callable[[Sequence[int]], str] | None = None,
        mesh: Mesh | None = None,
    ):
        """Prepare for prompts of up to `width` tokens and responses of up to `room` tokens.

        Each replica of `mesh` holds up to `rows` requests on the device and decodes up to `slots`
        of them at a time. `context` limits prompt and response together, by default to `width` +
        `room`. `text` decodes token ids, which stop strings need.
        """
        self.model, self.text = model, text
        self.width, self.room, self.chunk_steps = width, room, chunk_steps
        self.context = width + room if context is None else context
        memory = layout_of(memory, model.config, mesh, self.context, slots)
        limit = rows if rows is not None else 2**30
        self.shape = Shape.of(
            limit, width, self.context - width, slots, memory.align, continued=True
        )
        self.rows = rows if rows is not None else 4 * self.shape.slots
        self.replicas = replica_count(mesh)
        self.block = min(BLOCK, self.rows)
        self.statistics = Statistics()
        self.capacities = capacities(self.shape)
        self.capacity = self.capacities[0]
        self._jitted = EnginePrograms(
            model, memory, self.shape, rows=self.rows, width=width, room=room, seed=seed, mesh=mesh
        )
        self._runs: dict[int, Any] = {}
        self._params: Params | None = None
        self._state: EngineState | None = None

    @property
    def programs(self) -> int:
        """Number of compiled programs that decode."""
        return len(self._runs)

    # -- parameters

    def load(self, params: Params, version: int = 0, *, compiled: bool = True) -> None:
        """Sample from `params` from now on; the first call compiles, unless `fit` is to do it.

        `version` is the update count that is recorded with each token drawn from them.
        """
        self._params = params = self._jitted.to_decode_layout(params)
        self.version = jnp.int32(version)
        if compiled and not self._runs:
            self._compile(params, self.capacities)
            self._state = self._jitted.make(self.capacity)

    def fit(self, positions: int) -> None:
        """Resize the caches of an engine without requests, for sequences of `positions` tokens.

        They grow or shrink to `capacity_for` these; only its program is compiled, if it is new.
        """
        assert self._params is not None
        self.capacity = self.capacity_for(positions)
        if self.capacity not in self._runs:
            self._compile(self._params, [self.capacity])
        self._state = self._jitted.make(self.capacity)

    def compiled(self, capacity: int) -> bool:
        """Return whether there is a program for caches of this size."""
        return capacity in self._runs

    def capacity_for(self, positions: int) -> int:
        """Return the smallest of `capacities` for `positions` tokens, else the largest."""
        return next((each for each in self.capacities if each >= positions), self.capacities[-1])

    def _compile(self, params: Params, sizes: Sequence[int]) -> None:
        start = time.perf_counter()
        for capacity in sizes:
            self._runs[capacity] = self._jitted.compile_run(capacity, params, self.version)
        self.statistics.compile_seconds += time.perf_counter() - start

    # -- requests

    def generate(self, requests: Sequence[Request], budget: Budget = NO_BUDGET) -> list[Completion]:
        """Return one response to each request, in the order of the requests."""
        positions: dict[int, deque[int]] = {}
        for index, request in enumerate(requests):
            positions.setdefault(request.id, deque()).append(index)
        done: list[Completion | None] = [None] * len(requests)
        for completion in self.stream(requests, budget):
            done[positions[completion.id].popleft()] = completion
        return [completion for completion in done if completion is not None]

    def stream(
        self,
        requests: Iterable[Request],
        budget: Budget = NO_BUDGET,
        feed: Feed | None = None,
        partial: bool = False,
    ) -> Iterator[Completion]:
        """Yield each response when it ends, or unfinished when the budget ends.

        Requests with the largest `expected` length start first; consecutive requests with the same
        prompt share its prefill. `feed` is asked for more of them between two runs. `partial` also
        yields the responses so far, `running`, after each run of `chunk_steps`.

        Raises UserError for a request that cannot be sampled, RuntimeError before `load`.
        """
        if self._params is None:
            raise RuntimeError("Engine.load must be called before requests are sampled")
        return self._stream(deque(self._checked(requests)), budget, feed, partial)

    def _checked(self, requests: Iterable[Request]) -> list[Request]:
        """Return the requests, the longest expected first; raise UserError for a wrong one."""
        ordered = sorted(requests, key=lambda request: -request.expected)
        for request in ordered:
            check_request(request, self.model.size)
            if request.knobs.stop_strings and self.text is None:
                raise UserError(f"request {request.id}: stop strings need a tokenizer")
        return ordered

    def _stream(
        self, pending: deque[Request], budget: Budget, feed: Feed | None, partial: bool
    ) -> Iterator[Completion]:
        running: dict[Place, Request] = {}
        searched: dict[Place, int] = {}
        free = [deque(range(self.rows)) for _ in range(self.replicas)]
        end = None if budget.seconds is None else time.monotonic() + budget.seconds
        left = budget.tokens
        try:
            while True:
                if feed is not None:
                    self._drop(frozenset(feed.abandoned()), pending, running, free, searched)
                    pending.extend(self._checked(feed.arriving()))
                if not (pending or running):
                    break
                for request in self._admit(pending, running, free):
                    yield empty(request, "overlong")
                if not running:
                    continue
                steps = self.chunk_steps
                if left is not None:
                    steps = min(steps, left // (self.replicas * self.shape.slots))
                if steps == 0 or (end is not None and time.monotonic() >= end):
                    break
                finish, count, drawn = self._advance(running, steps)
                left = None if left is None else left - drawn
                over = [at for at in running if finish[at] != RUNNING]
                texts = [at for at, r in running.items() if partial or r.knobs.stop_strings]
                for at, completion in self._fetch(running, {*over, *texts}, finish, count):
                    strings = running[at].knobs.stop_strings
                    if strings and self.text is not None:
                        start = searched.get(at, 0)
                        completion = cut_at_stop_string(completion, strings, self.text, start)
                    searched[at] = len(completion.tokens)
                    if completion.finish != "running":
                        self.statistics.not_finite += completion.finish == "not_finite"
                        if at not in over:
                            self._cancel(at)
                        free[at[0]].append(at[1])
                        del running[at], searched[at]
                        yield completion
                    elif partial:
                        yield completion
            if running:
                finish, count, _ = self._progress()
                for _, completion in self._fetch(running, set(running), finish, count):
                    yield dataclasses.replace(completion, finish="budget")
            yield from (empty(request, "budget") for request in pending)
        finally:
            if running:  # The caller stopped early: the next call starts without these rows.
                self._state = self._jitted.make(self.capacity)

    # -- between two runs

    def _admit(
        self,
        pending: deque[Request],
        running: dict[Place, Request],
        free: list[deque[int]],
    ) -> list[Request]:
        """Write pending requests to free rows of the tables; return those that are too long."""
        refused: list[Request] = []
        while any(free) and pending:
            blocks: list[list[tuple[int, Request]]] = [[] for _ in range(self.replicas)]
            last: Request | None = None
            replica = 0
            while pending:
                request = pending[0]
                if not self._fits(request):
                    refused.append(pending.popleft())
                    continue
                # Consecutive requests with the same prompt go to one replica while it has rows.
                able = [r for r in range(self.replicas) if free[r] and len(blocks[r]) < self.block]
                if not able:
                    break
                if last is None or replica not in able or not _same_prompt(last, request):
                    replica = max(able, key=lambda r: len(free[r]))
                row = free[replica].popleft()
                blocks[replica].append((row, pending.popleft()))
                running[replica, row] = last = request
            state = self._state
            assert state is not None
            requests, ring = self._jitted.write(state.requests, state.ring, *self._block(blocks))
            self._state = dataclasses.replace(state, requests=requests, ring=ring)
        self.statistics.overlong += len(refused)
        return refused

    def _fits(self, request: Request) -> bool:
        """Return whether prompt, begun response and longest response have room."""
        begun = 0 if request.begun is None else len(request.begun.tokens)
        longest = len(request.prompt) + min(request.knobs.max_tokens, self.room)
        return len(request.prompt) <= self.width and begun <= self.room and longest <= self.context

    def _drop(
        self,
        gone: frozenset[int],
        pending: deque[Request],
        running: dict[Place, Request],
        free: list[deque[int]],
        searched: dict[Place, int],
    ) -> None:
        """Remove the requests with these ids, waiting or running."""
        if not gone:
            return
        kept = [request for request in pending if request.id not in gone]
        pending.clear()
        pending.extend(kept)
        for at in [at for at, request in running.items() if request.id in gone]:
            self._cancel(at)
            free[at[0]].append(at[1])
            del running[at]
            searched.pop(at, None)

    def _block(self, blocks: list[list[tuple[int, Request]]]) -> tuple[np.ndarray, Requests]:
        """Return the table rows i32[D, A] of the requests, padded with Q, and their contents."""
        shape = (self.replicas, self.block)
        rows = np.full(shape, self.rows, np.int32)
        like = jax.eval_shape(lambda: blank_requests(self.block, self.width, self.room))
        table = jax.tree.map(lambda x: np.zeros((self.replicas, *x.shape), x.dtype), like)
        knobs = table.sampling
        for d, block in enumerate(blocks):
            for i, (row, request) in enumerate(block):
                rows[d, i] = row
                table.prompt[d, i, : len(request.prompt)] = request.prompt
                table.length[d, i] = len(request.prompt)
                table.sample_id[d, i] = request.id
                for name in ("temperature", "top_p", "top_k", "min_p", "min_tokens", "max_tokens",
                             "entropy"):  # fmt: skip
                    getattr(knobs, name)[d, i] = getattr(request.knobs, name)
                knobs.stop[d, i] = padded_stop(request.knobs.stop)
                if (begun := request.begun) is not None:
                    count = len(begun.tokens)
                    table.count[d, i] = count
                    for name, own in OF_TOKENS.items():
                        if (value := getattr(begun, own)) is not None:
                            getattr(table, name)[d, i, :count] = value
        return rows, table

    def _advance(
        self, running: dict[Place, Request], steps: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Run at most `steps` steps; return finish codes [D, Q], counts [D, Q], tokens drawn."""
        self._grow_cache(running, steps)
        run = self._runs[self.capacity]
        self._state = run(self._params, self._state, jnp.int32(steps), self.version)
        finish, count, counters = self._progress()
        sums = {name: int(np.sum(value)) for name, value in vars(counters).items()}
        drawn, statistics = sums["drawn"], self.statistics
        for name in ("steps", "drawn", "prefills", "prefilled", "stalled", "preempted"):
            setattr(statistics, name, getattr(statistics, name) + sums[name])
        statistics.slot_steps += sums["steps"] * self.shape.slots
        return finish, count, drawn

    def _progress(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """Fetch the finish codes [D, Q], token counts [D, Q] and counters; wait for the device."""
        assert self._state is not None
        requests = self._state.requests
        return jax.device_get((requests.finish, requests.count, self._state.counters))

    def _grow_cache(self, running: dict[Place, Request], steps: int) -> None:
        """Grow the KV cache if a running row may need more positions within `steps` steps."""
        if len(self.capacities) == 1:
            return
        _, count, _ = self._progress()
        longest = max(len(request.prompt) + int(count[at]) for at, request in running.items())
        need = min(longest + steps, self.capacities[-1])
        capacity = next(each for each in self.capacities if each >= need)
        if capacity > self.capacity:
            self._state = self._jitted.grow(self._state, capacity)
            self.capacity = capacity

    def _fetch(
        self,
        running: dict[Place, Request],
        places: set[Place],
        finish: np.ndarray,
        count: np.ndarray,
    ) -> Iterator[tuple[Place, Completion]]:
        """Yield the responses so far of some rows, fetched in blocks."""
        assert self._state is not None
        by_replica = [
            sorted(q for d, q in places if d == replica) for replica in range(self.replicas)
        ]
        for start in range(0, max(map(len, by_replica), default=0), self.block):
            at = np.zeros((self.replicas, self.block), np.int32)
            pieces = [each[start : start + self.block] for each in by_replica]
            for d, piece in enumerate(pieces):
                at[d, : len(piece)] = piece
            found = jax.device_get(self._jitted.pick(self._state.requests, at))
            for d, piece in enumerate(pieces):
                for i, q in enumerate(piece):
                    real = slice(0, int(count[d, q]))
                    fields = {own: found[name][d, i, real] for name, own in OF_TOKENS.items()}
                    code = FINISH[int(finish[d, q])]
                    yield (d, q), Completion(id=running[d, q].id, finish=code, **fields)  # pyright: ignore[reportArgumentType]

    def _cancel(self, at: Place) -> None:
        """Remove a row from its replica's slots and queue."""
        rows = np.full(self.replicas, self.rows, np.int32)
        rows[at[0]] = at[1]
        self._state = self._jitted.remove(self._state, rows)


def _same_prompt(one: Request, other: Request) -> bool:
    return np.array_equal(one.prompt, other.prompt)
