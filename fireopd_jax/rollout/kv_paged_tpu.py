"""A paged KV cache in the layout of JAX's ragged paged attention for TPUs, for decoding steps.

    a layer's pool: [N, page, 2 K, H], keys and values of a head interleaved

Prefill works as in every paged cache; the kernel runs only the steps of one token for each slot.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from fireopd_jax.config import UserError, config
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.ops.precision import precisely
from fireopd_jax.rollout.kv_codec import finite
from fireopd_jax.rollout.kv_paged import Paged

LANES = 128
"""The kernel supports head widths that are multiples of this."""
BLOCK, QUERIES = 256, 32
"""Keys and queries in one block of the kernel."""


@config
class PagedTPU(Paged):
    """A paged cache; JAX's ragged paged attention for TPUs runs the decoding steps."""

    kind: Literal["paged_tpu"] = "paged_tpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values in the model's dtype."""

    heads_axis = 2

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Return a layer's empty pool; raise UserError for an unsupported model."""
        if c.head_dim % LANES:
            raise UserError(
                f"rollout.cache.kind=paged_tpu needs a head width that is a multiple of {LANES}, "
                f"this model has {c.head_dim}; expected paged or dense"
            )
        shape = (count, self.page_size, 2 * c.num_key_value_heads, c.head_dim)
        return jnp.zeros(shape, c.dtype)

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write full pages; return keys and values as later reads give them, and the pool."""
        k, v = finite(k), finite(v)
        both = _interleaved(k, v)
        rows, _, heads, width = both.shape
        pages = both.reshape(rows, at.shape[1], self.page_size, heads, width)
        return (k, v), kept.at[at].set(pages, mode="drop")

    def _write_tokens(self, kept: Any, page: Array, at: Array, k: Array, v: Array) -> Any:
        """Return the pool with one token of each row written to its page."""
        both = _interleaved(finite(k), finite(v))
        return kept.at[page, at].set(both[:, 0], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return keys and values of the rows, [B, K, S, H]."""
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

        rows = q.shape[0]
        with precisely(dtype):
            out = kernel.ragged_paged_attention(
                q[:, 0],
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
        return out[:, None]


def _interleaved(k: Array, v: Array) -> Array:
    """Return keys and values [R, K, N, H] interleaved by head: [R, N, 2 K, H]."""
    both = jnp.stack([k, v], axis=2).swapaxes(1, 3)  # [R, N, 2, K, H]
    rows, length, _, heads, width = both.shape
    return both.swapaxes(2, 3).reshape(rows, length, 2 * heads, width)
