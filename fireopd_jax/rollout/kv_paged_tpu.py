"""A paged KV cache in the layout of JAX's ragged paged attention for TPUs, for decoding steps.

    a layer's pool: [N, page, 2 K, L], keys and values of a head interleaved

A head's H numbers are filled up with zeros to L lanes. Tokens are written where the pool is
contiguous, so XLA updates it in place. Prefill works as in every paged cache; the kernel runs only
the steps of one token for each slot, on each device of a `tensor` axis for its own heads.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Int32, Shaped
from pydantic import Field

from fireopd_jax.config import UserError, config
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.ops.precision import precisely
from fireopd_jax.rollout.kv_codec import finite
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.state import PIECE, Shape

TENSOR = "tensor"
LANES = 128
"""The kernel's heads, and the tiles of a TPU's memory, have multiples of this many columns."""
ENTRIES = 2**17
"""Entries of a page table, 4 bytes each, for which a core's 1 MiB of scalar memory has room."""
BLOCK, QUERIES = 256, 32
"""Keys and queries in one block of the kernel."""


@config
class PagedTPU(Paged):
    """A paged cache; JAX's ragged paged attention for TPUs runs the decoding steps."""

    kind: Literal["paged_tpu"] = "paged_tpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values in the model's dtype."""

    page_size: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Tokens in a page, a multiple of 8."""

    heads_axis = 2

    def pages(self, shape: Shape) -> int:
        """Return the number of pages.

        Raises UserError if one prompt and response may not fit, or the page table is too large.
        """
        if shape.slots * (shape.capacity // self.page_size) > ENTRIES:
            raise UserError(
                f"rollout.cache.page_size={self.page_size}: the page table of {shape.slots} slots "
                f"of {shape.capacity} tokens has more than the {ENTRIES:,} entries that the kernel "
                f"takes; expected {page_for(shape.slots, shape.capacity)}, or fewer rollout.slots"
            )
        return super().pages(shape)

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Return a layer's empty pool."""
        shape = (count, self.page_size, 2 * c.num_key_value_heads, lanes(c.head_dim))
        return jnp.zeros(shape, c.dtype)

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write full pages; return keys and values as later reads give them, and the pool."""
        k, v = finite(k), finite(v)
        both = filled(_interleaved(k, v))
        rows, _, heads, width = both.shape
        pages = both.reshape(rows, at.shape[1], self.page_size, heads, width)
        return (k, v), kept.at[at].set(pages, mode="drop")

    def _write_tokens(self, kept: Any, page: Array, at: Array, k: Array, v: Array) -> Any:
        """Return the pool with one token of each row written to its page."""
        both = filled(_interleaved(finite(k), finite(v)))
        return kept.at[page, at].set(both[:, 0], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return keys and values of the rows, [B, K, S, L]."""
        pages = kept[jnp.minimum(tables, kept.shape[0] - 1)]
        rows, count, page, heads, width = pages.shape
        lines = pages.reshape(rows, count * page, heads // 2, 2, width).transpose(3, 0, 2, 1, 4)
        return lines[0], lines[1]

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
        # Imported on use, because it imports all of Pallas.
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

        rows, width = q.shape[0], q.shape[3]

        def run(q: Array, kept: Array, position: Array, tables: Array) -> Array:
            return kernel.ragged_paged_attention(
                q,
                kept,
                position + 1,
                jnp.minimum(tables, kept.shape[0] - 1),
                jnp.arange(rows + 1, dtype=jnp.int32),
                jnp.full(1, rows, jnp.int32),
                sm_scale=scale,
                sliding_window=window,
                # The kernel's defaults query the local TPU, which fails in ahead-of-time compiles.
                num_kv_pages_per_block=min(tables.shape[1], max(1, BLOCK // self.page_size)),
                num_queries_per_block=min(rows, QUERIES),
            )

        with precisely(dtype):
            out = on_own_heads(run)(filled(q[:, 0]), kept, position, tables)
        return out[:, None, :, :width]


def page_for(slots: int, positions: int) -> int:
    """Return the smallest usual size of a page for so many slots of so many tokens."""
    page = 64
    while slots * -(-(positions + PIECE) // page) > ENTRIES:  # a slot ends with a whole piece
        page *= 2
    return page


def lanes(width: int) -> int:
    """Return the columns that a head of a width takes."""
    return -(-width // LANES) * LANES


def filled(x: Shaped[Array, "*S H"]) -> Shaped[Array, "*S L"]:
    """Return heads with zeros up to whole lanes, which change no product."""
    more = lanes(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]) if more else x


def on_own_heads(run: Callable[..., Array]) -> Callable[..., Array]:
    """Return `run(q, pool, position, tables)` on each device of a replica, for its own heads."""
    # Other axes of the mesh are manual here (`meshes.over_data`); a mesh of one device is none.
    if jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1) == 1:
        return run
    whole, queries, keys = P(), P(None, TENSOR), P(None, None, TENSOR)
    return jax.shard_map(
        run,
        in_specs=(queries, keys, whole, whole),
        out_specs=queries,
        axis_names={TENSOR},
        check_vma=False,
    )


def _interleaved(k: Array, v: Array) -> Array:
    """Return keys and values [R, K, N, H] interleaved by head: [R, N, 2 K, H]."""
    both = jnp.stack([k, v], axis=2).swapaxes(1, 3)  # [R, N, 2, K, H]
    rows, length, _, heads, width = both.shape
    return both.swapaxes(2, 3).reshape(rows, length, 2 * heads, width)
