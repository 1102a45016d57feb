"""A paged KV cache: slots allocate pages as they grow; the allocator is part of the program.

    position p of a row is in page table[row, p // page], at p % page
    a layer's pool: [N, K, page, H]

Memory grows with the tokens in use, not with the longest possible sequence. Rows with the same
prompt share its full pages and copy its last, partial one. There are no reference counts:
`reclaim` marks the pages in the tables of running slots and needed entries, and frees all others.
It runs only when a page is lacking, so a decoding step only pops pages from a stack.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32
from pydantic import Field, PositiveInt

from fireopd_jax.config import UserError, config
from fireopd_jax.models.decoder import Cache, CachedAttention, DecoderConfig
from fireopd_jax.ops.attention import attend_step, attend_to_past
from fireopd_jax.rollout.kv_codec import KVType, decode, encode, widths
from fireopd_jax.rollout.state import Shape
from fireopd_jax.types import pytree


@pytree
class PagedState:
    """The pool, the page tables of slots and entries, and the free pages. Page N means none."""

    pool: Any
    tables: Int32[Array, "B M"]
    entry_tables: Int32[Array, "R M"]
    free: Int32[Array, " N"]
    """A stack of pages: those before index `top` are free."""
    top: Int32[Array, ""]
    dropped: Bool[Array, ""]
    """Whether pages have been removed from a table since the last `reclaim`."""


@config
class Paged:
    """A cache in which slots share a pool of pages."""

    kind: Literal["paged"] = "paged"
    dtype: KVType = "model"
    """Keys and values in the model's dtype, or as 8-bit integers with a scale for each vector."""
    page_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    """Tokens in a page, a multiple of 8."""
    tokens: PositiveInt | None = None
    """Tokens in the pool of each replica; by default as many as a dense cache has."""

    heads_axis = 1
    """Axis of the key heads in every array of the pool."""
    runs_out = True
    """Whether a slot may lack room for its next token."""

    @property
    def align(self) -> int:
        """The tokens of a prefill step are a multiple of this."""
        return self.page_size

    def pages(self, shape: Shape) -> int:
        """Return the number of pages; raise UserError if one prompt and response may not fit."""
        capacity = shape.capacity
        most = shape.slots * capacity + shape.entries * shape.prompt
        count = -(-(self.tokens or most) // self.page_size)
        least = capacity // self.page_size + 2
        if count < least:
            raise UserError(
                f"rollout.cache.tokens={self.tokens}: a prompt and its response may need "
                f"{capacity} tokens; expected at least {least * self.page_size}"
            )
        return count

    def init(self, c: DecoderConfig, shape: Shape) -> PagedState:
        """Return an empty cache; no two arrays share a buffer, so it can be donated."""
        count, width = self.pages(shape), shape.capacity // self.page_size
        return PagedState(
            pool=tuple(self._empty(c, count) for _ in range(c.num_hidden_layers)),
            tables=jnp.full((shape.slots, width), count, jnp.int32),
            entry_tables=jnp.full((shape.entries, width), count, jnp.int32),
            free=jnp.arange(count, dtype=jnp.int32),
            top=jnp.int32(count),
            dropped=jnp.zeros((), bool),
        )

    def grow(self, state: PagedState, capacity: int) -> PagedState:
        """Return the cache with `capacity` positions in every slot; the pool does not change."""
        none, more = state.free.shape[0], capacity // self.page_size - state.tables.shape[1]

        def wider(table: Array) -> Array:
            return jnp.pad(table, ((0, 0), (0, more)), constant_values=none)

        return dataclasses.replace(
            state, tables=wider(state.tables), entry_tables=wider(state.entry_tables)
        )

    # -- prompts

    def fits_prompts(self, state: PagedState, length: Int32[Array, " R"]) -> Bool[Array, " R"]:
        """Return which of the next prompts fit into free pages, with one page left for decoding."""
        return jnp.cumsum(self._pages(length)) < state.top

    def allocate_prompts(self, state: PagedState, length: Int32[Array, " R"]) -> PagedState:
        """Allocate pages for the prompts, in the entries' tables."""
        need = self._pages(length)
        before = jnp.cumsum(need) - need
        at = jnp.arange(state.tables.shape[1])[None]
        page = state.free[jnp.maximum(state.top - 1 - before[:, None] - at, 0)]
        tables = jnp.where(at < need[:, None], page, state.free.shape[0])
        return dataclasses.replace(
            state, entry_tables=tables, top=state.top - need.sum(dtype=jnp.int32)
        )

    def prompt_cache(self, state: PagedState) -> Cache:
        """Return the arrays that a prefill writes to."""
        return state.pool

    def with_prompt_cache(self, state: PagedState, cache: Cache) -> PagedState:
        """Return the state with the arrays that a prefill has written."""
        return dataclasses.replace(state, pool=cache)

    def prefill(
        self, state: PagedState, start: Int32[Array, ""], dtype: jnp.dtype
    ) -> CachedAttention:
        """Return attention of one prefill step, which also writes its keys and values.

        Queries are at positions `start` to `start + N - 1` of every entry.
        """

        def attention(kept, window, q, k, v, scale):
            pages = q.shape[1] // self.page_size

            def block(j: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(state.entry_tables, j * pages, pages, axis=1)

            def past(j: Array) -> tuple[Array, Array]:
                keys, values = self._rows(kept, block(j), dtype)
                return keys[..., : q.shape[3]], values[..., : q.shape[3]]

            own, kept = self._write_pages(kept, block(start // q.shape[1]), k, v, dtype)
            several = past if state.entry_tables.shape[1] > pages else None
            return attend_to_past(q, own, several, start, window, scale), kept

        return attention

    # -- slots

    def fits_slots(self, state: PagedState, length: Int32[Array, " F"]) -> Bool[Array, " F"]:
        """Return which of the next requests fit: each needs a page to copy a partial one."""
        return jnp.cumsum(length % self.page_size > 0) <= state.top

    def insert(
        self,
        state: PagedState,
        entry: Int32[Array, " F"],
        slot: Int32[Array, " F"],
        length: Int32[Array, " F"],
        piece: int,
    ) -> PagedState:
        """Share the entries' full pages with slots and copy the partial one; slot B: no copy."""
        none, page = state.free.shape[0], self.page_size
        whole, source = length // page, state.entry_tables[entry]
        copies = (slot < state.tables.shape[0]) & (length % page > 0)
        rank = jnp.cumsum(copies) - 1
        new = jnp.where(copies, state.free[jnp.maximum(state.top - 1 - rank, 0)], none)
        last = jnp.take_along_axis(
            source, jnp.minimum(whole, source.shape[1] - 1)[:, None], axis=1
        )[:, 0]
        at = jnp.arange(source.shape[1])[None]
        rows = jnp.where(at < whole[:, None], source, none)
        rows = jnp.where((at == whole[:, None]) & copies[:, None], new[:, None], rows)

        def copy(pool: Array) -> Array:
            return self._copy_page(pool, new, jnp.minimum(last, none - 1))

        return dataclasses.replace(
            state,
            pool=jax.tree.map(copy, state.pool),
            tables=state.tables.at[slot].set(rows, mode="drop"),
            top=state.top - copies.sum(dtype=jnp.int32),
            dropped=jnp.ones_like(state.dropped),
        )

    def ready(
        self, state: PagedState, position: Array, active: Array, order: Array
    ) -> Bool[Array, " B"]:
        """Return which slots have room for one more token; if pages are few, the newest wait."""
        need = self._needs_page(state, position, active)
        older = need[None] & (order[None] < order[:, None])
        return active & (~need | (older.sum(axis=1) < state.top))

    def allocate_tokens(self, state: PagedState, position: Array, decoding: Array) -> PagedState:
        """Allocate a page for each decoding slot that has none for its next token."""
        need = self._needs_page(state, position, decoding)
        rank = jnp.cumsum(need) - 1
        page = state.free[jnp.maximum(state.top - 1 - rank, 0)]
        row = jnp.where(need, jnp.arange(need.shape[0]), need.shape[0])
        tables = state.tables.at[row, position // self.page_size].set(page, mode="drop")
        return dataclasses.replace(state, tables=tables, top=state.top - need.sum(dtype=jnp.int32))

    def slot_cache(self, state: PagedState) -> Cache:
        """Return the arrays that a decoding step writes to."""
        return state.pool

    def with_slot_cache(self, state: PagedState, cache: Cache) -> PagedState:
        """Return the state with the arrays that a decoding step has written."""
        return dataclasses.replace(state, pool=cache)

    def decode(
        self,
        state: PagedState,
        position: Int32[Array, " B"],
        decoding: Bool[Array, " B"],
        dtype: jnp.dtype,
    ) -> CachedAttention:
        """Return attention of one decoding step; `decoding` slots also write keys and values."""
        none, page = state.free.shape[0], self.page_size
        at = jnp.minimum(position // page, state.tables.shape[1] - 1)
        target = jnp.take_along_axis(state.tables, at[:, None], axis=1)[:, 0]
        target = jnp.where(decoding, target, none)
        last = jnp.where(decoding, position, 0)

        def attention(kept, window, q, k, v, scale):
            kept = self._write_tokens(kept, target, position % page, k, v)
            return self._attend(kept, state.tables, last, q, window, scale, dtype), kept

        return attention

    # -- garbage collection

    def has_garbage(self, state: PagedState, active: Array, entries: Array) -> Bool[Array, ""]:
        """Return whether some pages belong to no running slot and no needed entry."""
        none = state.free.shape[0]
        dead = (state.tables[:, 0] < none) & ~active
        return state.dropped | dead.any() | ((state.entry_tables[:, 0] < none) & ~entries).any()

    def reclaim(self, state: PagedState, active: Array, entries: Array) -> PagedState:
        """Free every page that is in no table of an active slot or a needed entry."""
        none = state.free.shape[0]
        tables = jnp.where(active[:, None], state.tables, none)
        entry_tables = jnp.where(entries[:, None], state.entry_tables, none)
        used = jnp.zeros(none, bool).at[tables].set(True, mode="drop")
        used = used.at[entry_tables].set(True, mode="drop")
        free = jnp.nonzero(~used, size=none, fill_value=0)[0].astype(jnp.int32)
        return dataclasses.replace(
            state,
            tables=tables,
            entry_tables=entry_tables,
            free=free,
            top=(~used).sum(dtype=jnp.int32),
            dropped=jnp.zeros_like(state.dropped),
        )

    # -- layout of a layer's pages

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Return a layer's empty pool: keys and values, each [N, K, page, H]."""
        kinds = widths(c.head_dim, self.dtype, jnp.dtype(c.dtype))
        shape = (count, c.num_key_value_heads, self.page_size)
        return tuple(
            tuple(jnp.zeros((*shape, width), dtype) for width, dtype in kinds) for _ in range(2)
        )

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write full pages; return keys and values as later reads give them, and the pool."""
        new = [encode(x, self.dtype) for x in (k, v)]

        def write(pool: Array, leaf: Array) -> Array:
            rows, heads, _, width = leaf.shape
            pages = leaf.reshape(rows, heads, at.shape[1], self.page_size, width).swapaxes(1, 2)
            return pool.at[at].set(pages, mode="drop")

        kept = tuple(
            tuple(write(pool, leaf) for pool, leaf in zip(buffer, leaves, strict=True))
            for buffer, leaves in zip(kept, new, strict=True)
        )
        return (decode(new[0], dtype), decode(new[1], dtype)), kept

    def _write_tokens(self, kept: Any, page: Array, at: Array, k: Array, v: Array) -> Any:
        """Return the pool with one token of each row written to its page."""
        return tuple(
            tuple(
                pool.at[page, :, at].set(leaf[:, :, 0], mode="drop")
                for pool, leaf in zip(buffer, encode(x, self.dtype), strict=True)
            )
            for buffer, x in zip(kept, (k, v), strict=True)
        )

    def _copy_page(self, pool: Array, to: Array, source: Array) -> Array:
        """Return the pool with pages copied; a copy to page N is dropped."""
        return pool.at[to].set(pool[source], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return keys and values of the rows, [B, K, S, H]; missing pages are masked by callers."""

        def gather(pool: Array) -> Array:
            pages = pool[jnp.minimum(tables, pool.shape[0] - 1)]
            rows, count, heads, page, width = pages.shape
            return pages.swapaxes(1, 2).reshape(rows, heads, count * page, width)

        keys, values = (decode(tuple(gather(pool) for pool in buffer), dtype) for buffer in kept)
        return keys, values

    def _attend(
        self,
        kept: Any,
        tables: Array,
        position: Array,
        q: Array,
        window: int | None,
        scale: float,
        dtype: jnp.dtype,
    ) -> Array:
        """Return attention of each row's token at `position` to all positions up to it."""
        page = self.page_size

        def columns(start: Array | int, size: int) -> tuple[Array, Array]:
            own = jax.lax.dynamic_slice_in_dim(tables, start // page, size // page, axis=1)
            return self._rows(kept, own, dtype)

        length, heads = tables.shape[1] * page, jax.tree.leaves(kept)[0].shape[self.heads_axis]
        return jnp.asarray(attend_step(q, columns, heads, length, position, window, scale, page))

    # -- counting

    def _pages(self, length: Array) -> Array:
        return -(-length // self.page_size)

    def _needs_page(self, state: PagedState, position: Array, active: Array) -> Bool[Array, " B"]:
        """Return which active slots have no page for their next token."""
        at = jnp.minimum(position // self.page_size, state.tables.shape[1] - 1)
        page = jnp.take_along_axis(state.tables, at[:, None], axis=1)[:, 0]
        return active & (page == state.free.shape[0])
