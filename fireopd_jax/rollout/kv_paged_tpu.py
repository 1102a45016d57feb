"""Pages as JAX's ragged paged attention for TPUs wants them, which then does the decoding.

    a layer's pool: [N, page, 2 K, H], keys and values of a head side by side

Prompts are attended to as with any pages; only the step of one token a slot is the kernel's.
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
"""The kernel takes heads of a multiple of this width."""
BLOCK, QUERIES = 256, 32
"""Keys and queries that the kernel takes at a time."""


@config
class PagedTPU(Paged):
    """Pages, decoded by a kernel of JAX's for TPUs."""

    kind: Literal["paged_tpu"] = "paged_tpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values as the model computes them."""

    heads_axis = 2

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Allocate a layer's pool."""
        if c.head_dim % LANES:
            raise UserError(
                f"rollout.cache.kind=paged_tpu takes heads of a multiple of {LANES}, the model's "
                f"have {c.head_dim}; expected paged or dense"
            )
        shape = (count, self.page_size, 2 * c.num_key_value_heads, c.head_dim)
        return jnp.zeros(shape, c.dtype)

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write whole pages; give the keys and values as they will be read, and the pool."""
        k, v = finite(k), finite(v)
        both = _side_by_side(k, v)
        rows, _, heads, width = both.shape
        pages = both.reshape(rows, at.shape[1], self.page_size, heads, width)
        return (k, v), kept.at[at].set(pages, mode="drop")

    def _write_tokens(self, kept: Any, page: Array, at: Array, k: Array, v: Array) -> Any:
        """Write one token of each row into its page."""
        both = _side_by_side(finite(k), finite(v))
        return kept.at[page, at].set(both[:, 0], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Lay the pages of each row side by side: [B, K, S, H]."""
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
        """Attend from each row's position to it and all before."""
        # Imported where it is wanted: it brings all of Pallas.
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
                # Its own table of block sizes asks which TPU is here, which fails ahead of time.
                num_kv_pages_per_block=min(tables.shape[1], max(1, BLOCK // self.page_size)),
                num_queries_per_block=min(rows, QUERIES),
            )
        return out[:, None]


def _side_by_side(k: Array, v: Array) -> Array:
    """Interleave [R, K, N, H] keys and values: [R, N, 2 K, H]."""
    both = jnp.stack([k, v], axis=2).swapaxes(1, 3)  # [R, N, 2, K, H]
    rows, length, _, heads, width = both.shape
    return both.swapaxes(2, 3).reshape(rows, length, 2 * heads, width)
