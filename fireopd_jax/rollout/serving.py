"""The host's side of continuous batching: requests come, responses leave as they end.

    pending -> admit -> [run `chunk_steps` -> status -> read what ended -> admit]* -> Completion

The device holds a table of requests, their queue and the slots (`state`); the host only tops the
table up between two bounded runs and takes out what has ended. One loop a replica of the mesh.
All programs are compiled by `load`, one for each size that the cache may grow to.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine import DENSE, CacheLayout
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.meshes import over_data, replica_count, state_shardings
from fireopd_jax.rollout.requests import (
    Budget,
    Completion,
    Request,
    check_request,
    empty,
    padded_stop,
)
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import (
    FINISH,
    RUNNING,
    EngineState,
    Requests,
    Shape,
    empty_requests,
    initial_state,
    pick,
    remove,
    write,
)

GROW_FROM = 1024
"""Positions of a slot from which on the cache starts at a quarter and grows."""
NO_BUDGET = Budget()
BLOCK = 64
"""Requests that are written to a replica's table, or read from it, at a time."""


@dataclasses.dataclass
class Statistics:
    """What an engine has done; sums over replicas."""

    steps: int = 0
    drawn: int = 0
    slot_steps: int = 0
    prefills: int = 0
    prefilled: int = 0
    stalled: int = 0
    preempted: int = 0
    not_finite: int = 0
    overlong: int = 0
    compile_seconds: float = 0.0

    @property
    def slot_use(self) -> float:
        """Share of the slots' steps that gave a token."""
        return self.drawn / max(self.slot_steps, 1)


class Engine:
    """Draws responses to requests from one model."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        width: int,
        room: int,
        seed: int,
        slots: int | None = None,
        rows: int | None = None,
        memory: CacheLayout = DENSE,
        chunk_steps: int = 64,
        text: Callable[[Sequence[int]], str] | None = None,
        mesh: Mesh | None = None,
    ):
        """Prepare for prompts of up to `width` and responses of up to `room` tokens.

        `rows` requests may be on the device at a time, `slots` of them decoded, on each replica.
        `text` turns tokens into text, for stop strings.
        """
        self.model, self.memory, self.text, self.mesh = model, memory, text, mesh
        self.width, self.room, self.chunk_steps = width, room, chunk_steps
        limit = rows if rows is not None else 2**30
        self.shape = Shape.of(limit, width, room, slots, memory.align)
        self.rows = rows if rows is not None else 4 * self.shape.slots
        self.replicas = replica_count(mesh)
        self.block = min(BLOCK, self.rows)
        self.seed = jnp.uint32(seed)
        self.statistics = Statistics()
        self.capacities = self._capacities()
        self.capacity = self.capacities[0]
        self._runs: dict[int, Any] = {}
        self._params: Params | None = None
        self._state: EngineState | None = None
        self._jit()

    @property
    def programs(self) -> int:
        """Count the compiled programs that decode."""
        return len(self._runs)

    # -- parameters

    def load(self, params: Params, version: int = 0) -> None:
        """Take parameters, laid out for decoding; the first time, compile."""
        self._params = self._to_decode_layout(params)
        self.version = jnp.int32(version)
        if not self._runs:
            start = time.perf_counter()
            for capacity in self.capacities:
                arguments = (self._params, self._shape_of(capacity), jnp.int32(0), self.version)
                self._runs[capacity] = self._run.lower(*arguments).compile()
            self.statistics.compile_seconds = time.perf_counter() - start
            self._state = self._make(self.capacity, self.seed)

    # -- requests

    def generate(self, requests: Sequence[Request], budget: Budget = NO_BUDGET) -> list[Completion]:
        """Draw all, and return them in the order of the requests."""
        positions: dict[int, deque[int]] = {}
        for index, request in enumerate(requests):
            positions.setdefault(request.id, deque()).append(index)
        done: list[Completion | None] = [None] * len(requests)
        for completion in self.stream(requests, budget):
            done[positions[completion.id].popleft()] = completion
        return [completion for completion in done if completion is not None]

    def stream(
        self, requests: Iterable[Request], budget: Budget = NO_BUDGET
    ) -> Iterator[Completion]:
        """Draw all, and yield each response when it ends, or as it is when the budget ends.

        Those expected to be long start first; neighbours with one prompt share its prefill.
        """
        if self._params is None:
            raise RuntimeError("an engine draws nothing before `load`")
        pending = deque(sorted(requests, key=lambda request: -request.expected))
        for request in pending:
            check_request(request, self.model.size)
            if request.knobs.stop_strings and self.text is None:
                raise UserError(f"request {request.id}: stop strings need a tokenizer")
        return self._stream(pending, budget)

    def _stream(self, pending: deque[Request], budget: Budget) -> Iterator[Completion]:
        running: dict[tuple[int, int], Request] = {}
        searched: dict[tuple[int, int], int] = {}
        free = [deque(range(self.rows)) for _ in range(self.replicas)]
        end = None if budget.seconds is None else time.monotonic() + budget.seconds
        left = budget.tokens
        try:
            while pending or running:
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
                texts = [at for at, r in running.items() if r.knobs.stop_strings]
                for at, completion in self._read(running, {*over, *texts}, finish, count):
                    completion = self._cut_at_text(running[at], completion, searched.get(at, 0))
                    searched[at] = len(completion.tokens)
                    if completion.finish != "running":
                        self.statistics.not_finite += completion.finish == "not_finite"
                        if at not in over:
                            self._abort(at)
                        free[at[0]].append(at[1])
                        del running[at], searched[at]
                        yield completion
            if running:
                finish, count, _ = self._status()
                for _, completion in self._read(running, set(running), finish, count):
                    yield dataclasses.replace(completion, finish="budget")
            yield from (empty(request, "budget") for request in pending)
        finally:
            if running:  # stopped early: nothing of it may go on
                self._state = self._make(self.capacity, self.seed)

    # -- between two runs

    def _admit(
        self,
        pending: deque[Request],
        running: dict[tuple[int, int], Request],
        free: list[deque[int]],
    ) -> list[Request]:
        """Write waiting requests to the tables while there is room; give back those too long."""
        refused: list[Request] = []
        while any(free) and pending:
            blocks: list[list[tuple[int, Request]]] = [[] for _ in range(self.replicas)]
            last: Request | None = None
            replica = 0
            while pending:
                request = pending[0]
                begun = 0 if request.begun is None else len(request.begun.tokens)
                if len(request.prompt) > self.width or begun > self.room:
                    refused.append(pending.popleft())
                    continue
                # Neighbours with one prompt stay together while there is room.
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
            requests, ring = self._write(state.requests, state.ring, *self._block(blocks))
            self._state = dataclasses.replace(state, requests=requests, ring=ring)
        self.statistics.overlong += len(refused)
        return refused

    def _block(self, blocks: list[list[tuple[int, Request]]]) -> tuple[np.ndarray, Requests]:
        """Lay requests out as rows of the tables; row Q is none."""
        shape = (self.replicas, self.block)
        rows = np.full(shape, self.rows, np.int32)
        whole = jax.eval_shape(
            lambda: empty_requests(self.block, self.width, self.room, _no_knobs())
        )
        table = jax.tree.map(lambda x: np.zeros((self.replicas, *x.shape), x.dtype), whole)
        knobs = table.sampling
        for d, block in enumerate(blocks):
            for i, (row, request) in enumerate(block):
                rows[d, i] = row
                table.prompt[d, i, : len(request.prompt)] = request.prompt
                table.length[d, i] = len(request.prompt)
                table.sample_id[d, i] = request.id
                for name in ("temperature", "top_p", "top_k", "min_p", "min_tokens", "max_tokens"):
                    getattr(knobs, name)[d, i] = getattr(request.knobs, name)
                knobs.stop[d, i] = padded_stop(request.knobs.stop)
                if (begun := request.begun) is not None:
                    count = len(begun.tokens)
                    table.count[d, i] = count
                    table.tokens[d, i, :count] = begun.tokens
                    table.logprob[d, i, :count] = begun.logprobs
                    table.model_logprob[d, i, :count] = begun.model_logprobs
                    table.version[d, i, :count] = begun.versions
        return rows, table

    def _advance(
        self, running: dict[tuple[int, int], Request], steps: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Run, and tell how each row fares: finish [D, Q], count [D, Q], tokens drawn."""
        self._make_room(running, steps)
        run = self._runs[self.capacity]
        self._state = run(self._params, self._state, jnp.int32(steps), self.version)
        finish, count, counters = self._status()
        sums = {name: int(np.sum(value)) for name, value in vars(counters).items()}
        drawn, statistics = sums["drawn"], self.statistics
        for name in ("steps", "drawn", "prefills", "prefilled", "stalled", "preempted"):
            setattr(statistics, name, getattr(statistics, name) + sums[name])
        statistics.slot_steps += sums["steps"] * self.shape.slots
        return finish, count, drawn

    def _status(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """Read how the rows fare, finish [D, Q] and count [D, Q], and the counters."""
        assert self._state is not None
        requests = self._state.requests
        return jax.device_get((requests.finish, requests.count, self._state.counters))

    def _make_room(self, running: dict[tuple[int, int], Request], steps: int) -> None:
        """Let the cache grow where the next run may need it."""
        if len(self.capacities) == 1:
            return
        _, count, _ = self._status()
        longest = max(len(request.prompt) + int(count[at]) for at, request in running.items())
        need = min(longest + steps, self.capacities[-1])
        capacity = next(each for each in self.capacities if each >= need)
        if capacity > self.capacity:
            self._state = self._grow(self._state, capacity)
            self.capacity = capacity

    def _read(
        self,
        running: dict[tuple[int, int], Request],
        rows: set[tuple[int, int]],
        finish: np.ndarray,
        count: np.ndarray,
    ) -> Iterator[tuple[tuple[int, int], Completion]]:
        """Fetch what has been drawn of some rows."""
        assert self._state is not None
        by_replica = [
            sorted(q for d, q in rows if d == replica) for replica in range(self.replicas)
        ]
        for start in range(0, max(map(len, by_replica), default=0), self.block):
            at = np.zeros((self.replicas, self.block), np.int32)
            pieces = [each[start : start + self.block] for each in by_replica]
            for d, piece in enumerate(pieces):
                at[d, : len(piece)] = piece
            tokens, logprob, model_logprob, version = jax.device_get(
                self._pick(self._state.requests, at)
            )
            for d, piece in enumerate(pieces):
                for i, q in enumerate(piece):
                    real = slice(0, int(count[d, q]))
                    yield (
                        (d, q),
                        Completion(
                            id=running[d, q].id,
                            tokens=tokens[d, i, real],
                            logprobs=logprob[d, i, real],
                            model_logprobs=model_logprob[d, i, real],
                            versions=version[d, i, real],
                            finish=FINISH[int(finish[d, q])],  # pyright: ignore[reportArgumentType]
                        ),
                    )

    def _cut_at_text(self, request: Request, completion: Completion, searched: int) -> Completion:
        """End a response after the token that completes the first of its stop strings.

        In the first `searched` tokens there is none.
        """
        strings = request.knobs.stop_strings
        if not strings or self.text is None:
            return completion

        def stopped(length: int, start: int = 0) -> bool:
            assert self.text is not None
            text = self.text(completion.tokens[start:length].tolist())
            return any(string in text for string in strings)

        low, high = 0, len(completion.tokens)
        # A text has no more tokens than bytes, and one more character may begin before it.
        reach = max(len(string.encode()) for string in strings) + 4
        if not stopped(high, max(0, searched - reach)):
            return completion
        while high - low > 1:  # a longer response contains what a shorter one does
            middle = (low + high) // 2
            low, high = (low, middle) if stopped(middle) else (middle, high)
        return completion.cut(high, "stop")

    # -- programs

    def _capacities(self) -> list[int]:
        whole, piece = self.shape.capacity, self.shape.piece
        if whole < GROW_FROM:
            return [whole]
        return sorted({-(-whole // part // piece) * piece for part in (4, 2)} | {whole})

    def _jit(self) -> None:
        """Wrap what runs on the devices; only `_run` is compiled more than once."""
        split, whole = PartitionSpec("data"), PartitionSpec()
        loop = Loop(self.model, self.memory, self.shape.piece, self.mesh)

        def on_replicas(function: Callable[..., Any], *stacked: bool) -> Callable[..., Any]:
            """Apply to each replica's part: the leading axis of what is stacked."""

            def one(*arguments: Any) -> Any:
                own = [
                    jax.tree.map(lambda x: x[0], argument) if own else argument
                    for argument, own in zip(arguments, stacked, strict=True)
                ]
                return jax.tree.map(lambda x: x[None], function(*own))

            specs = tuple(split if own else whole for own in stacked)
            return over_data(one, self.mesh, specs, split)

        def run(params: Params, state: EngineState, steps: Array, version: Array) -> EngineState:
            return loop.run(params, _counting_anew(state), steps, version)

        def make(capacity: int, seed: Array) -> EngineState:
            return jax.tree.map(
                lambda x: jnp.broadcast_to(x, (self.replicas, *x.shape)),
                self._initial_state(capacity, seed),
            )

        def grow(state: EngineState, capacity: int) -> EngineState:
            def one(state: EngineState) -> EngineState:
                return dataclasses.replace(state, cache=self.memory.grow(state.cache, capacity))

            return on_replicas(one, True)(state)

        shapes = jax.eval_shape(functools.partial(make, self.capacity), self.seed)
        places = state_shardings(shapes, self.memory, self.model, self.mesh)
        self._to_decode_layout = jax.jit(
            lambda params: self.model.to_decode_layout(params, self.mesh)
        )
        self._run = jax.jit(
            on_replicas(run, False, True, False, False), donate_argnums=1, out_shardings=places
        )
        self._make = jax.jit(make, static_argnums=0, out_shardings=places)
        self._grow = jax.jit(grow, static_argnums=1, out_shardings=places)
        # These do not see the cache, so that one that has grown compiles none of them again.
        self._write = jax.jit(on_replicas(write, *(True,) * 4), donate_argnums=(0, 1))
        self._remove = jax.jit(on_replicas(remove, True, True), donate_argnums=0)
        self._pick = jax.jit(on_replicas(pick, True, True))

    def _shape_of(self, capacity: int) -> EngineState:
        """Describe a state, as its program will be given it."""
        state = jax.eval_shape(functools.partial(self._make, capacity), self.seed)
        places = state_shardings(state, self.memory, self.model, self.mesh)
        if places is None:
            return state
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
        )

    def _initial_state(self, capacity: int, seed: Array) -> EngineState:
        shape = self.shape
        cache = self.memory.init(self.model.config, shape.slots, shape.entries, capacity)
        sampling = dataclasses.replace(_no_knobs(), seed=seed)
        requests = empty_requests(self.rows, self.width, self.room, sampling)
        return initial_state(requests, shape.slots, shape.entries, cache)

    def _abort(self, at: tuple[int, int]) -> None:
        """Let a row neither run nor wait."""
        rows = np.full(self.replicas, self.rows, np.int32)
        rows[at[0]] = at[1]
        self._state = self._remove(self._state, rows)


def _no_knobs() -> Sampling:
    return Sampling.of((), 1, 0)


def _same_prompt(one: Request, other: Request) -> bool:
    return np.array_equal(one.prompt, other.prompt)


def _counting_anew(state: EngineState) -> EngineState:
    """Count from 0 again, but for the order of the slots."""
    zero = jax.tree.map(jnp.zeros_like, state.counters)
    counters = dataclasses.replace(zero, inserted=state.counters.inserted)
    return dataclasses.replace(state, counters=counters)
