"""A key-value cache of pages that slots take as they grow, with its allocator inside the program.

    position p of a row lies in page table[row, p // page], at p % page
    a layer's pool: [N, K, page, H]

Memory grows with the tokens that are alive, not with the longest that might be. Rows of one prompt
share its whole pages and copy the last, unfinished one. Nobody counts references: `reclaim` marks
the pages that stand in a table of somebody alive, and all others are free. That happens only when
somebody lacks a page, so a step costs one look at a stack.
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
from fireopd_jax.ops.attention import attend
from fireopd_jax.rollout.kv_codec import KVType, decode, encode, widths
from fireopd_jax.rollout.kv_dense import attend_piece, seen
from fireopd_jax.types import pytree


@pytree
class PagedState:
    """The pool, who holds which page, and which are free. Page N is none."""

    pool: Any
    tables: Int32[Array, "B M"]
    entry_tables: Int32[Array, "R M"]
    free: Int32[Array, " N"]
    """A stack: the pages before `top` are free."""
    top: Int32[Array, ""]
    dropped: Bool[Array, ""]
    """Pages have left a table since the last `reclaim`."""


@config
class Paged:
    """Slots share a pool of pages."""

    kind: Literal["paged"] = "paged"
    dtype: KVType = "model"
    """Keys and values as the model computes them, or as 8-bit integers with a scale a vector."""
    page_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    """Tokens of a page, a multiple of 8."""
    tokens: PositiveInt | None = None
    """Tokens that the pool has room for, on each replica; by default as many as `dense` has."""

    heads_axis = 1
    """Axis of every array of the pool that counts the key heads."""
    runs_out = True
    """Whether a slot may find no room to go on."""

    @property
    def align(self) -> int:
        """Pieces of prompts are a multiple of it."""
        return self.page_size

    def pages(self, slots: int, entries: int, capacity: int) -> int:
        """Count the pages of the pool; a pool that cannot hold one response is refused."""
        count = -(-(self.tokens or (slots + entries) * capacity) // self.page_size)
        least = capacity // self.page_size + 2
        if count < least:
            raise UserError(
                f"rollout.cache.tokens={self.tokens}: a prompt and its response may need "
                f"{capacity} tokens; expected at least {least * self.page_size}"
            )
        return count

    def init(self, c: DecoderConfig, slots: int, entries: int, capacity: int) -> PagedState:
        """Allocate; every buffer is its own."""
        count, width = self.pages(slots, entries, capacity), capacity // self.page_size
        return PagedState(
            pool=tuple(self._empty(c, count) for _ in range(c.num_hidden_layers)),
            tables=jnp.full((slots, width), count, jnp.int32),
            entry_tables=jnp.full((entries, width), count, jnp.int32),
            free=jnp.arange(count, dtype=jnp.int32),
            top=jnp.int32(count),
            dropped=jnp.zeros((), bool),
        )

    def grow(self, state: PagedState, capacity: int) -> PagedState:
        """Let every slot hold more pages; the pool stays as it is."""
        none, more = state.free.shape[0], capacity // self.page_size - state.tables.shape[1]

        def wider(table: Array) -> Array:
            return jnp.pad(table, ((0, 0), (0, more)), constant_values=none)

        return dataclasses.replace(
            state, tables=wider(state.tables), entry_tables=wider(state.entry_tables)
        )

    def slot_capacity(self, state: PagedState) -> int:
        """Tell how many positions a slot may have."""
        return state.tables.shape[1] * self.page_size

    # -- prompts

    def fits_prompts(self, state: PagedState, length: Int32[Array, " R"]) -> Bool[Array, " R"]:
        """Tell which of the next prompts there is room for; one page stays for who decodes."""
        return jnp.cumsum(self._pages(length)) < state.top

    def allocate_prompts(self, state: PagedState, length: Int32[Array, " R"]) -> PagedState:
        """Take pages for the prompts."""
        need = self._pages(length)
        before = jnp.cumsum(need) - need
        at = jnp.arange(state.tables.shape[1])[None]
        page = state.free[jnp.maximum(state.top - 1 - before[:, None] - at, 0)]
        tables = jnp.where(at < need[:, None], page, state.free.shape[0])
        return dataclasses.replace(
            state, entry_tables=tables, top=state.top - need.sum(dtype=jnp.int32)
        )

    def prompt_cache(self, state: PagedState) -> Cache:
        """Give what the prefill writes to."""
        return state.pool

    def with_prompt_cache(self, state: PagedState, cache: Cache) -> PagedState:
        """Put back what the prefill has written."""
        return dataclasses.replace(state, pool=cache)

    def prefill(
        self, state: PagedState, start: Int32[Array, ""], dtype: jnp.dtype
    ) -> CachedAttention:
        """Attend from columns `start`... of every entry to those columns and all before."""
        tables, page = state.entry_tables, self.page_size

        def mix(kept, window, q, k, v, scale):
            at = jax.lax.dynamic_slice_in_dim(tables, start // page, q.shape[1] // page, axis=1)
            new, kept = self._write_pages(kept, at, k, v, dtype)

            def whole() -> tuple[Array, Array]:
                return self._rows(kept, tables, dtype)

            capacity = self.slot_capacity(state)
            return attend_piece(q, new, whole, start, capacity, window, scale), kept

        return mix

    # -- slots

    def fits_slots(self, state: PagedState, length: Int32[Array, " F"]) -> Bool[Array, " F"]:
        """Tell which of the next requests there is room for in the slots."""
        return jnp.cumsum(length % self.page_size > 0) <= state.top

    def insert(
        self,
        state: PagedState,
        entry: Int32[Array, " F"],
        slot: Int32[Array, " F"],
        length: Int32[Array, " F"],
        piece: int,
    ) -> PagedState:
        """Share the whole pages of the entries with the slots and copy the last; slot B is none."""
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
        """Tell which slots can take one more token; where pages lack, the youngest wait."""
        need = self._lacks(state, position, active)
        older = need[None] & (order[None] < order[:, None])
        return active & (~need | (older.sum(axis=1) < state.top))

    def allocate_tokens(self, state: PagedState, position: Array, going: Array) -> PagedState:
        """Take a page for each slot that goes on and has none for its next token."""
        need = self._lacks(state, position, going)
        rank = jnp.cumsum(need) - 1
        page = state.free[jnp.maximum(state.top - 1 - rank, 0)]
        row = jnp.where(need, jnp.arange(need.shape[0]), need.shape[0])
        tables = state.tables.at[row, position // self.page_size].set(page, mode="drop")
        return dataclasses.replace(state, tables=tables, top=state.top - need.sum(dtype=jnp.int32))

    def slot_cache(self, state: PagedState) -> Cache:
        """Give what a decoding step writes to."""
        return state.pool

    def with_slot_cache(self, state: PagedState, cache: Cache) -> PagedState:
        """Put back what a decoding step has written."""
        return dataclasses.replace(state, pool=cache)

    def decode(
        self,
        state: PagedState,
        position: Int32[Array, " B"],
        going: Bool[Array, " B"],
        dtype: jnp.dtype,
    ) -> CachedAttention:
        """Attend from each slot's next position to it and all before; only `going` slots write."""
        none, page = state.free.shape[0], self.page_size
        at = jnp.minimum(position // page, state.tables.shape[1] - 1)
        target = jnp.take_along_axis(state.tables, at[:, None], axis=1)[:, 0]
        target = jnp.where(going, target, none)

        def mix(kept, window, q, k, v, scale):
            kept = self._write_tokens(kept, target, position % page, k, v)
            return self._attend(kept, state.tables, position, q, window, scale, dtype), kept

        return mix

    # -- what is held in vain

    def has_garbage(self, state: PagedState, active: Array, entries: Array) -> Bool[Array, ""]:
        """Tell whether pages are held by nobody who is alive."""
        none = state.free.shape[0]
        dead = (state.tables[:, 0] < none) & ~active
        return state.dropped | dead.any() | ((state.entry_tables[:, 0] < none) & ~entries).any()

    def reclaim(self, state: PagedState, active: Array, entries: Array) -> PagedState:
        """Free every page that stands in no table of a running slot or a wanted entry."""
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

    # -- how a layer's pages lie

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Allocate a layer's pool: keys and values, each [N, K, page, H]."""
        kinds = widths(c.head_dim, self.dtype, jnp.dtype(c.dtype))
        shape = (count, c.num_key_value_heads, self.page_size)
        return tuple(
            tuple(jnp.zeros((*shape, width), dtype) for width, dtype in kinds) for _ in range(2)
        )

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write whole pages; give the keys and values as they will be read, and the pool."""
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
        """Write one token of each row into its page."""
        return tuple(
            tuple(
                pool.at[page, :, at].set(leaf[:, :, 0], mode="drop")
                for pool, leaf in zip(buffer, encode(x, self.dtype), strict=True)
            )
            for buffer, x in zip(kept, (k, v), strict=True)
        )

    def _copy_page(self, pool: Array, to: Array, source: Array) -> Array:
        """Copy whole pages; page N is nowhere."""
        return pool.at[to].set(pool[source], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Lay the pages of each row side by side: [B, K, S, H]; what is none gets masked later."""

        def lay(pool: Array) -> Array:
            pages = pool[jnp.minimum(tables, pool.shape[0] - 1)]
            rows, count, heads, page, width = pages.shape
            return pages.swapaxes(1, 2).reshape(rows, heads, count * page, width)

        keys, values = (decode(tuple(lay(pool) for pool in buffer), dtype) for buffer in kept)
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
        """Attend from each row's position to it and all before."""
        keys, values = self._rows(kept, tables, dtype)
        distance = position[:, None] - jnp.arange(keys.shape[2])[None]
        return jnp.asarray(attend(q, keys, values, seen(distance, window)[:, None], scale))

    # -- counting

    def _pages(self, length: Array) -> Array:
        return -(-length // self.page_size)

    def _lacks(self, state: PagedState, position: Array, active: Array) -> Bool[Array, " B"]:
        """Tell which slots have no page for their next token."""
        at = jnp.minimum(position // self.page_size, state.tables.shape[1] - 1)
        page = jnp.take_along_axis(state.tables, at[:, None], axis=1)[:, 0]
        return active & (page == state.free.shape[0])
