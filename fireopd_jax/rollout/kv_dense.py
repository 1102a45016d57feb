"""A key-value cache in which every slot owns room for the longest text: plain, and the oracle.

    prompt --prefill, in pieces of W columns--> entries --copy--> slots

Keys are [rows, K, H, S] and values [rows, K, S, H]: a query's products with all keys, and the sum
of all values, then both read what lies side by side. With keys as values are, a CPU takes 1.7 to 5
times as long for a step's attention. Column p of S holds position p. Each layer has buffers of its
own, updated in place. A prompt is computed once in an entry, and copied to as many slots as want a
response to it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from fireopd_jax.config import config
from fireopd_jax.models.decoder import Cache, CachedAttention, DecoderConfig
from fireopd_jax.ops.attention import attend
from fireopd_jax.rollout.kv_codec import KVType, Leaves, decode, encode, widths
from fireopd_jax.types import pytree


@pytree
class DenseState:
    """Keys, turned, and values of each layer: pairs of what `encode` keeps."""

    slots: Any
    entries: Any


@config
class Dense:
    """Every slot has room for the longest prompt and response."""

    kind: Literal["dense"] = "dense"
    dtype: KVType = "model"
    """Keys and values as the model computes them, or as 8-bit integers with a scale a vector."""

    heads_axis = 1
    """Axis of every array that counts the key heads."""
    axes = (3, 2)
    """The axis of keys, and that of values, which counts the positions."""
    align = 8
    """Pieces of prompts are a multiple of it."""
    runs_out = False
    """Whether a slot may find no room to go on."""

    def init(self, c: DecoderConfig, slots: int, entries: int, capacity: int) -> DenseState:
        """Allocate; every buffer is its own."""

        def layers(rows: int) -> Cache:
            return tuple(self._empty(c, rows, capacity) for _ in range(c.num_hidden_layers))

        return DenseState(layers(slots), layers(entries))

    def grow(self, state: DenseState, capacity: int) -> DenseState:
        """Give every slot and entry more columns."""

        def wider(x: Array, axis: int) -> Array:
            more = [(0, 0)] * 4
            more[axis] = (0, capacity - x.shape[axis])
            return jnp.pad(x, more)

        return DenseState(self._by_axis(wider, state.slots), self._by_axis(wider, state.entries))

    def slot_capacity(self, state: DenseState) -> int:
        """Tell how many positions a slot has room for."""
        return jax.tree.leaves(state)[0].shape[self.axes[0]]

    # -- prompts

    def fits_prompts(self, state: DenseState, length: Int32[Array, " R"]) -> Bool[Array, " R"]:
        """Tell which of the next prompts there is room for."""
        return jnp.ones(length.shape, bool)

    def allocate_prompts(self, state: DenseState, length: Int32[Array, " R"]) -> DenseState:
        """Make room for the prompts in the entries."""
        return state

    def prompt_cache(self, state: DenseState) -> Cache:
        """Give what the prefill writes to."""
        return state.entries

    def with_prompt_cache(self, state: DenseState, cache: Cache) -> DenseState:
        """Put back what the prefill has written."""
        return DenseState(state.slots, cache)

    def prefill(
        self, state: DenseState, start: Int32[Array, ""], dtype: jnp.dtype
    ) -> CachedAttention:
        """Attend from columns `start`... of every entry to those columns and all before."""

        def mix(kept, window, q, k, v, scale):
            new = self._keep(k, v)

            def put(old: Array, axis: int, leaf: Array) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(old, leaf, start, axis)

            kept = self._by_axis(put, (kept,), (new,))[0]
            capacity = self.slot_capacity(state)
            pair = functools.partial(self._read, dtype=dtype)
            out = attend_piece(q, pair(new), lambda: pair(kept), start, capacity, window, scale)
            return out, kept

        return mix

    # -- slots

    def fits_slots(self, state: DenseState, length: Int32[Array, " F"]) -> Bool[Array, " F"]:
        """Tell which of the next requests there is room for in the slots."""
        return jnp.ones(length.shape, bool)

    def insert(
        self,
        state: DenseState,
        entry: Int32[Array, " F"],
        slot: Int32[Array, " F"],
        length: Int32[Array, " F"],
        piece: int,
    ) -> DenseState:
        """Copy the first `length` columns of the entries to the slots; slot B is nowhere."""

        def copy(carry):
            start, slots = carry

            def one(old: Array, axis: int, source: Array) -> Array:
                columns = jax.lax.dynamic_slice_in_dim(source, start, piece, axis)
                return put_columns(old, slot, start, columns[entry], axis)

            return start + piece, self._by_axis(one, slots, state.entries)

        most = jnp.where(slot < slots_of(state.slots), length, 0).max()
        _, slots = jax.lax.while_loop(lambda c: c[0] < most, copy, (jnp.int32(0), state.slots))
        return DenseState(slots, state.entries)

    def ready(
        self, state: DenseState, position: Array, active: Array, order: Array
    ) -> Bool[Array, " B"]:
        """Tell which slots can take one more token."""
        return active

    def allocate_tokens(self, state: DenseState, position: Array, going: Array) -> DenseState:
        """Make room for one more token in the slots that go on."""
        return state

    def slot_cache(self, state: DenseState) -> Cache:
        """Give what a decoding step writes to."""
        return state.slots

    def with_slot_cache(self, state: DenseState, cache: Cache) -> DenseState:
        """Put back what a decoding step has written."""
        return DenseState(cache, state.entries)

    def decode(
        self,
        state: DenseState,
        position: Int32[Array, " B"],
        going: Bool[Array, " B"],
        dtype: jnp.dtype,
    ) -> CachedAttention:
        """Attend from each slot's next position to it and all before; only `going` slots write."""
        rows = jnp.arange(position.shape[0])
        capacity = self.slot_capacity(state)
        column = jnp.where(going, position, capacity)

        def mix(kept, window, q, k, v, scale):
            def put(old: Array, axis: int, leaf: Array) -> Array:
                at = (rows, *[slice(None)] * (axis - 1), column)
                return old.at[at].set(leaf.squeeze(axis), mode="drop", unique_indices=True)

            kept = self._by_axis(put, (kept,), (self._keep(k, v),))[0]
            return self._attend(kept, position, q, window, scale, dtype), kept

        return mix

    def reclaim(self, state: DenseState, active: Array, entries: Array) -> DenseState:
        """Free the room that is held by nobody."""
        return state

    # -- how a layer's keys and values lie

    def _empty(self, c: DecoderConfig, rows: int, capacity: int) -> tuple[Leaves, Leaves]:
        """Allocate a layer's buffers."""
        shape = (rows, c.num_key_value_heads, capacity)
        kept = widths(c.head_dim, self.dtype, jnp.dtype(c.dtype))
        keys = tuple(jnp.zeros((*shape[:2], width, capacity), dtype) for width, dtype in kept)
        return keys, tuple(jnp.zeros((*shape, width), dtype) for width, dtype in kept)

    def _keep(self, k: Array, v: Array) -> tuple[Leaves, Leaves]:
        """Turn keys and values [B, K, S, H] into what is kept."""
        turned = tuple(jnp.swapaxes(leaf, 2, 3) for leaf in encode(k, self.dtype))
        return turned, encode(v, self.dtype)

    def _read(self, kept: tuple[Leaves, Leaves], dtype: jnp.dtype) -> tuple[Array, Array]:
        """Turn what is kept into keys and values; the compiler turns nothing, it reads."""
        return jnp.swapaxes(decode(kept[0], dtype), 2, 3), decode(kept[1], dtype)

    def _attend(
        self,
        kept: tuple[Leaves, Leaves],
        position: Int32[Array, " B"],
        q: Array,
        window: int | None,
        scale: float,
        dtype: jnp.dtype,
    ) -> Array:
        """Attend from each row's position to it and all before."""
        keys, values = self._read(kept, dtype)
        distance = position[:, None] - jnp.arange(keys.shape[2])[None]
        return jnp.asarray(attend(q, keys, values, seen(distance, window)[:, None], scale))

    def _by_axis(self, function: Callable[..., Array], layers: Cache, *others: Any) -> Cache:
        """Change each array by function(array, its axis of positions, *others' arrays)."""
        return tuple(
            tuple(
                jax.tree.map(lambda x, *rest, axis=axis: function(x, axis, *rest), kept, *rest)
                for axis, kept, *rest in zip(self.axes, layer, *more, strict=True)
            )
            for layer, *more in zip(layers, *others, strict=True)
        )


def seen(distance: Int32[Array, "*B S"], window: int | None) -> Bool[Array, "*B S"]:
    """Tell which keys a query sees, by how far they lie before it."""
    past = distance >= 0
    return past if window is None else past & (distance < window)


def attend_piece(
    q: Array,
    new: tuple[Array, Array],
    kept: Callable[[], tuple[Array, Array]],
    start: Array,
    capacity: int,
    window: int | None,
    scale: float,
) -> Array:
    """Attend from one piece of the prompts: the first looks at its own keys and values alone."""
    rows, length = q.shape[:2]
    at = jnp.arange(length)

    def look(keys: Array, values: Array, distance: Array) -> Array:
        mask = jnp.broadcast_to(seen(distance, window)[None], (rows, *distance.shape))
        return jnp.asarray(attend(q, keys, values, mask, scale))

    def first() -> Array:
        return look(*new, at[:, None] - at[None])

    def later() -> Array:
        return look(*kept(), start + at[:, None] - jnp.arange(capacity)[None])

    if capacity == length:
        return first()
    # Only the result leaves the branches: a cache that passes through one would be copied.
    return jax.lax.cond(start == 0, first, later)


def put_columns(buffer: Array, rows: Array, start: Array, values: Array, axis: int) -> Array:
    """Write `values`, a row each, at `start` on an axis of the named rows; row B is nowhere."""
    at = jnp.stack([rows, jnp.broadcast_to(start, rows.shape)], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, axis),
    )
    return jax.lax.scatter(buffer, at, values, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def slots_of(layers: Any) -> int:
    """Count the rows of a cache."""
    return jax.tree.leaves(layers)[0].shape[0]
