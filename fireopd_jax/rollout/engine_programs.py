"""The jitted functions of an engine, over all replicas of a mesh.

    params                         -> to_decode_layout -> params in the decode layout
    capacity                       -> make             -> state without requests
    params, state, steps, version  -> run              -> state after at most `steps` more steps
    state, capacity                -> grow             -> the same state with longer KV caches
    requests -> write;  row -> remove;  rows -> pick

The arrays of a state are stacked over the D replicas, [D, ...], and sharded over the replicas.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.engine import CacheLayout
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.meshes import over_data, replica_count, state_shardings
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import (
    EngineState,
    Requests,
    Shape,
    empty_requests,
    initial_state,
    pick,
    remove,
    write,
)
from fireopd_jax.sharding.mesh import REPLICAS

GROW_FROM = 1024
"""Positions of a slot from which on the cache starts at a quarter of them and grows."""


def capacities(shape: Shape) -> list[int]:
    """Return the positions of a slot that programs are compiled for, ascending.

    A short cache has its full size from the start; a long one grows over a quarter and a half.
    """
    full, piece = shape.capacity, shape.piece
    if full < GROW_FROM:
        return [full]
    return sorted({-(-full // part // piece) * piece for part in (4, 2)} | {full})


def blank_requests(rows: int, width: int, room: int, seed: Array | int = 0) -> Requests:
    """Return a request table of Q = `rows` empty rows."""
    sampling = dataclasses.replace(Sampling.of((), 1, 0), seed=jnp.uint32(seed))
    return empty_requests(rows, width, room, sampling)


class EnginePrograms:
    """The jitted functions of one engine; only `run` is compiled more than once, by capacity."""

    def __init__(
        self,
        model: LanguageModel,
        memory: CacheLayout,
        shape: Shape,
        *,
        rows: int,
        width: int,
        room: int,
        seed: int,
        mesh: Mesh | None,
    ):
        self.seed, replicas = jnp.uint32(seed), replica_count(mesh)
        loop = Loop(model, memory, shape.piece, mesh)

        def run(params: Params, state: EngineState, steps: Array, version: Array) -> EngineState:
            return loop.run(params, _with_zero_counters(state), steps, version)

        def make(capacity: int, seed: Array) -> EngineState:
            requests = blank_requests(rows, width, room, seed)
            there = dataclasses.replace(shape, capacity=capacity, prompt=capacity)
            cache = memory.init(model.config, there)
            state = initial_state(requests, shape.slots, shape.entries, cache)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (replicas, *x.shape)), state)

        def grow(state: EngineState, capacity: int) -> EngineState:
            def one(state: EngineState) -> EngineState:
                return dataclasses.replace(state, cache=memory.grow(state.cache, capacity))

            return on_replicas(one, mesh, True)(state)

        shapes = jax.eval_shape(functools.partial(make, shape.capacity), self.seed)
        self._shardings = state_shardings(shapes, memory, model, mesh)
        self._make = jax.jit(make, static_argnums=0, out_shardings=self._shardings)
        self._run = jax.jit(
            on_replicas(run, mesh, False, True, False, False),
            donate_argnums=1,
            out_shardings=self._shardings,
        )
        self.grow = jax.jit(grow, static_argnums=1, out_shardings=self._shardings)
        self.to_decode_layout = jax.jit(lambda params: model.to_decode_layout(params, mesh))
        # These do not take the cache, so that a cache that has grown recompiles none of them.
        self.write = jax.jit(on_replicas(write, mesh, *(True,) * 4), donate_argnums=(0, 1))
        self.remove = jax.jit(on_replicas(remove, mesh, True, True), donate_argnums=0)
        self.pick = jax.jit(on_replicas(pick, mesh, True, True))

    def make(self, capacity: int) -> EngineState:
        """Return a state without requests whose slots have `capacity` positions."""
        return self._make(capacity, self.seed)

    def compile_run(self, capacity: int, params: Params, version: Int32[Array, ""]) -> Any:
        """Compile the decoding loop, which donates its state, for slots of `capacity` positions."""
        state = jax.eval_shape(functools.partial(self._make, capacity), self.seed)
        if self._shardings is not None:
            state = jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                state,
                self._shardings,
            )
        return self._run.lower(params, state, jnp.int32(0), version).compile()


def on_replicas(
    function: Callable[..., Any], mesh: Mesh | None, *stacked: bool
) -> Callable[..., Any]:
    """Apply `function` on each replica to its own part of the arguments that are stacked."""
    split, whole = PartitionSpec(REPLICAS), PartitionSpec()

    def one(*arguments: Any) -> Any:
        own = [
            jax.tree.map(lambda x: x[0], argument) if has_replicas else argument
            for argument, has_replicas in zip(arguments, stacked, strict=True)
        ]
        return jax.tree.map(lambda x: x[None], function(*own))

    specs = tuple(split if has_replicas else whole for has_replicas in stacked)
    return over_data(one, mesh, specs, split)


def _with_zero_counters(state: EngineState) -> EngineState:
    """Reset all counters but `inserted`, from which the slots' order is counted."""
    zero = jax.tree.map(jnp.zeros_like, state.counters)
    counters = dataclasses.replace(zero, inserted=state.counters.inserted)
    return dataclasses.replace(state, counters=counters)
