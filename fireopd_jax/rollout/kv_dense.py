"""The dense KV cache: every slot has room for the longest sequence. Reference for other layouts.

    prompt --prefill, W columns a step--> entries --copy--> slots

Keys are [rows, K, H, S] and values [rows, K, S, H], so that the products of a query with all keys
and the weighted sum of all values both read contiguous memory. With keys in the layout of values, a
CPU takes 1.7 to 5 times as long for the attention of a decoding step. Column p of S has position p.
Each layer has its own buffers, updated in place. A prompt is computed once, in an entry, and copied
to every slot with a response to it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from fireopd_jax.config import config
from fireopd_jax.models.decoder import Cache, CachedAttention, DecoderConfig
from fireopd_jax.ops.attention import attend_step, attend_to_past
from fireopd_jax.rollout.kv_codec import KVType, Leaves, decode, encode, widths
from fireopd_jax.rollout.state import Shape
from fireopd_jax.types import pytree


@pytree
class DenseState:
    """Stored keys and values (`kv_codec.encode`) of each layer, for slots and for entries."""

    slots: Any
    entries: Any


@config
class Dense:
    """A cache with room for the longest prompt and response in every slot."""

    kind: Literal["dense"] = "dense"
    dtype: KVType = "model"
    """Keys and values in the model's dtype, or as 8-bit integers with a scale for each vector."""

    heads_axis = 1
    """Axis of the key heads in every array."""
    axes = (3, 2)
    """Axis of the positions, in keys and in values."""
    align = 8
    """The tokens of a prefill step are a multiple of this."""
    runs_out = False
    """Whether a slot may lack room for its next token."""

    def init(self, c: DecoderConfig, shape: Shape) -> DenseState:
        """Return an empty cache; no two arrays share a buffer, so it can be donated."""

        def layers(rows: int, positions: int) -> Cache:
            return tuple(self._empty(c, rows, positions) for _ in range(c.num_hidden_layers))

        return DenseState(layers(shape.slots, shape.capacity), layers(shape.entries, shape.prompt))

    def grow(self, state: DenseState, capacity: int) -> DenseState:
        """Return the cache with `capacity` positions in every slot and entry."""

        def wider(x: Array, axis: int) -> Array:
            more = [(0, 0)] * 4
            more[axis] = (0, capacity - x.shape[axis])
            return jnp.pad(x, more)

        return DenseState(self._by_axis(wider, state.slots), self._by_axis(wider, state.entries))

    def positions(self, rows: Cache) -> int:
        """Return the number of positions of each slot, or of each entry."""
        return jax.tree.leaves(rows)[0].shape[self.axes[0]]

    # -- prompts

    def fits_prompts(self, state: DenseState, length: Int32[Array, " R"]) -> Bool[Array, " R"]:
        """Return which of the next prompts fit into the entries: all."""
        return jnp.ones(length.shape, bool)

    def allocate_prompts(self, state: DenseState, length: Int32[Array, " R"]) -> DenseState:
        """Allocate room for the prompts in the entries: nothing to do here."""
        return state

    def prompt_cache(self, state: DenseState) -> Cache:
        """Return the arrays that a prefill writes to."""
        return state.entries

    def with_prompt_cache(self, state: DenseState, cache: Cache) -> DenseState:
        """Return the state with the arrays that a prefill has written."""
        return DenseState(state.slots, cache)

    def prefill(
        self, state: DenseState, start: Int32[Array, ""], dtype: jnp.dtype
    ) -> CachedAttention:
        """Return attention of one prefill step, which also writes its keys and values.

        Queries are at positions `start` to `start + N - 1` of every entry.
        """

        def attention(kept, window, q, k, v, scale):
            new = self._encode(k, v)

            def put(old: Array, axis: int, leaf: Array) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(old, leaf, start, axis)

            kept = self._by_axis(put, (kept,), (new,))[0]
            length = q.shape[1]

            def past(j: Array) -> tuple[Array, Array]:
                return self._columns(kept, j * length, length, dtype)

            several = past if self.positions(state.entries) > length else None
            own = self._decode(new, dtype)
            return attend_to_past(q, own, several, start, window, scale), kept

        return attention

    # -- slots

    def fits_slots(self, state: DenseState, length: Int32[Array, " F"]) -> Bool[Array, " F"]:
        """Return which of the next requests fit into slots: all."""
        return jnp.ones(length.shape, bool)

    def insert(
        self,
        state: DenseState,
        entry: Int32[Array, " F"],
        slot: Int32[Array, " F"],
        length: Int32[Array, " F"],
        piece: int,
    ) -> DenseState:
        """Copy the first `length` positions of entries to slots; slot B: no copy."""

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
        """Return which slots have room for one more token: all active ones."""
        return active

    def allocate_tokens(self, state: DenseState, position: Array, decoding: Array) -> DenseState:
        """Allocate room for one more token in the decoding slots: nothing to do here."""
        return state

    def slot_cache(self, state: DenseState) -> Cache:
        """Return the arrays that a decoding step writes to."""
        return state.slots

    def with_slot_cache(self, state: DenseState, cache: Cache) -> DenseState:
        """Return the state with the arrays that a decoding step has written."""
        return DenseState(cache, state.entries)

    def decode(
        self,
        state: DenseState,
        position: Int32[Array, " B"],
        decoding: Bool[Array, " B"],
        dtype: jnp.dtype,
    ) -> CachedAttention:
        """Return attention of one decoding step; `decoding` slots also write keys and values."""
        rows = jnp.arange(position.shape[0])
        capacity = self.positions(state.slots)
        column = jnp.where(decoding, position, capacity)
        last = jnp.where(decoding, position, 0)

        def attention(kept, window, q, k, v, scale):
            def put(old: Array, axis: int, leaf: Array) -> Array:
                at = (rows, *[slice(None)] * (axis - 1), column)
                return old.at[at].set(leaf.squeeze(axis), mode="drop", unique_indices=True)

            kept = self._by_axis(put, (kept,), (self._encode(k, v),))[0]
            return self._attend(kept, last, q, window, scale, dtype), kept

        return attention

    def reclaim(self, state: DenseState, active: Array, entries: Array) -> DenseState:
        """Free unused room: nothing to do here."""
        return state

    # -- layout of a layer's keys and values

    def _empty(self, c: DecoderConfig, rows: int, capacity: int) -> tuple[Leaves, Leaves]:
        """Return a layer's empty buffers for keys and values."""
        shape = (rows, c.num_key_value_heads, capacity)
        kept = widths(c.head_dim, self.dtype, jnp.dtype(c.dtype))
        keys = tuple(jnp.zeros((*shape[:2], width, capacity), dtype) for width, dtype in kept)
        return keys, tuple(jnp.zeros((*shape, width), dtype) for width, dtype in kept)

    def _encode(self, k: Array, v: Array) -> tuple[Leaves, Leaves]:
        """Return the stored form of keys and values [B, K, S, H]."""
        transposed = tuple(jnp.swapaxes(leaf, 2, 3) for leaf in encode(k, self.dtype))
        return transposed, encode(v, self.dtype)

    def _decode(self, kept: tuple[Leaves, Leaves], dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return keys and values [B, K, S, H]; XLA fuses the transpose into the reads."""
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
        """Return attention of each row's token at `position` to all positions up to it."""

        def columns(start: Array | int, size: int) -> tuple[Array, Array]:
            return self._columns(kept, start, size, dtype)

        length, heads = self.positions((kept,)), kept[0][0].shape[self.heads_axis]
        return jnp.asarray(attend_step(q, columns, heads, length, position, window, scale))

    def _columns(
        self, kept: tuple[Leaves, Leaves], start: Array | int, size: int, dtype: jnp.dtype
    ) -> tuple[Array, Array]:
        """Return keys and values [B, K, size, H] from position `start` on."""

        def block(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

        return self._decode(self._by_axis(block, (kept,))[0], dtype)

    def _by_axis(self, function: Callable[..., Array], layers: Cache, *others: Any) -> Cache:
        """Apply function(array, its axis of positions, *arrays of others) to each array."""
        return tuple(
            tuple(
                jax.tree.map(lambda x, *rest, axis=axis: function(x, axis, *rest), kept, *rest)
                for axis, kept, *rest in zip(self.axes, layer, *more, strict=True)
            )
            for layer, *more in zip(layers, *others, strict=True)
        )


def put_columns(buffer: Array, rows: Array, start: Array, values: Array, axis: int) -> Array:
    """Return `buffer` with `values` written to `rows` at `start` of an axis; row B: no write."""
    at = jnp.stack([rows, jnp.broadcast_to(start, rows.shape)], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, axis),
    )
    return jax.lax.scatter(buffer, at, values, numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def slots_of(layers: Any) -> int:
    """Return the number of rows of a cache."""
    return jax.tree.leaves(layers)[0].shape[0]
