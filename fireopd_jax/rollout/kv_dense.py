"""A key-value cache in which every slot owns room for the longest text: plain, and the oracle.

    prompt --prefill, in pieces of W columns--> entries [R, K, S, H] --copy--> slots [B, K, S, H]

Column p holds position p. Each layer has buffers of its own, updated in place. A prompt is computed
once in an entry, and copied to as many slots as want a response to it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from fireopd_jax.config import config
from fireopd_jax.models.decoder import Cache, CachedAttention, DecoderConfig
from fireopd_jax.ops.attention import attend
from fireopd_jax.rollout.kv_codec import KVType, decode, encode, widths
from fireopd_jax.types import pytree


@pytree
class DenseState:
    """Keys and values of each layer, as pairs of what `encode` keeps."""

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
    align = 8
    """Pieces of prompts are a multiple of it."""

    def init(self, c: DecoderConfig, slots: int, entries: int, capacity: int) -> DenseState:
        """Allocate; every buffer is its own."""

        def layer(rows: int):
            return tuple(
                tuple(
                    jnp.zeros((rows, c.num_key_value_heads, capacity, width), dtype)
                    for width, dtype in widths(c.head_dim, self.dtype, jnp.dtype(c.dtype))
                )
                for _ in range(2)
            )

        depth = range(c.num_hidden_layers)
        return DenseState(tuple(layer(slots) for _ in depth), tuple(layer(entries) for _ in depth))

    def grow(self, state: DenseState, capacity: int) -> DenseState:
        """Give every slot and entry more columns."""

        def wider(x: Array) -> Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0)))

        return jax.tree.map(wider, state)

    def columns(self, state: DenseState) -> int:
        """Tell how many positions a slot has room for."""
        return jax.tree.leaves(state)[0].shape[2]

    # -- prompts

    def fits(self, state: DenseState, length: Int32[Array, " R"]) -> Bool[Array, " R"]:
        """Tell which of the next prompts there is room for."""
        return jnp.ones(length.shape, bool)

    def open(self, state: DenseState, length: Int32[Array, " R"]) -> DenseState:
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
            new = [encode(x, self.dtype) for x in (k, v)]
            kept = tuple(
                tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, leaf, start, axis=2)
                    for old, leaf in zip(buffer, leaves, strict=True)
                )
                for buffer, leaves in zip(kept, new, strict=True)
            )
            keys, values = (decode(leaves, dtype) for leaves in new)

            def whole() -> tuple[Array, Array]:
                return decode(kept[0], dtype), decode(kept[1], dtype)

            capacity = self.columns(state)
            out = attend_piece(q, (keys, values), whole, start, capacity, window, scale)
            return out, kept

        return mix

    # -- slots

    def seats(self, state: DenseState, length: Int32[Array, " F"]) -> Bool[Array, " F"]:
        """Tell which of the next requests there is room for in the slots."""
        return jnp.ones(length.shape, bool)

    def seat(
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

            def one(old: Array, source: Array) -> Array:
                columns = jax.lax.dynamic_slice_in_dim(source, start, piece, axis=2)
                return put_columns(old, slot, start, columns[entry])

            return start + piece, jax.tree.map(one, slots, state.entries)

        most = jnp.where(slot < slots_of(state.slots), length, 0).max()
        _, slots = jax.lax.while_loop(lambda c: c[0] < most, copy, (jnp.int32(0), state.slots))
        return DenseState(slots, state.entries)

    def ready(
        self, state: DenseState, position: Array, active: Array, born: Array
    ) -> Bool[Array, " B"]:
        """Tell which slots can take one more token."""
        return active

    def advance(self, state: DenseState, position: Array, going: Array) -> DenseState:
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
        capacity = self.columns(state)
        column = jnp.where(going, position, capacity)
        distance = position[:, None] - jnp.arange(capacity)[None]

        def mix(kept, window, q, k, v, scale):
            kept = tuple(
                tuple(
                    old.at[rows, :, column].set(leaf[:, :, 0], mode="drop", unique_indices=True)
                    for old, leaf in zip(buffer, encode(x, self.dtype), strict=True)
                )
                for buffer, x in zip(kept, (k, v), strict=True)
            )
            keys, values = (decode(leaves, dtype) for leaves in kept)
            return attend(q, keys, values, seen(distance, window)[:, None], scale), kept

        return mix

    # -- what is held in vain

    def garbage(self, state: DenseState, active: Array, entries: Array) -> Bool[Array, ""]:
        """Tell whether room is held by nobody who is alive."""
        return jnp.bool_(False)

    def reclaim(self, state: DenseState, active: Array, entries: Array) -> DenseState:
        """Free the room that is held by nobody."""
        return state


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


def put_columns(buffer: Array, rows: Array, start: Array, values: Array) -> Array:
    """Write [F, K, W, H] at `start` on axis 2 of the named rows of [B, K, S, H]; B is nowhere."""
    at = jnp.stack([rows, jnp.broadcast_to(start, rows.shape)], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
    )
    return jax.lax.scatter(buffer, at, values, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def slots_of(layers: Any) -> int:
    """Count the rows of a cache."""
    return jax.tree.leaves(layers)[0].shape[0]
