"""A paged KV cache in the layout of JAX's paged attention for GPUs, which runs decoding steps.

    a layer's pool: keys and values, each [K, N, page, H]

Prefill works as in every paged cache; the kernel runs only the steps of one token for each slot. It
is written for Pallas' Triton backend, which JAX 0.12 calls deprecated.
"""

import math
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from fireopd_jax.config import UserError, config
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.ops.precision import precisely
from fireopd_jax.rollout.kv_codec import finite
from fireopd_jax.rollout.kv_paged import Paged

LEAST = 16
"""Smallest head width and page size of the kernel's blocks."""
SPLITS, PAGES = 16, 8
"""Parallel parts of a row's pages, and pages that the kernel reads at a time."""


def library() -> Any:
    """Return the kernel's module, imported on use because it imports all of Pallas."""
    with warnings.catch_warnings():
        # JAX 0.11 deprecates this module and names no replacement.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from jax.experimental.pallas.ops.gpu import paged_attention
        except ImportError as error:
            raise UserError(
                f"rollout.cache.kind=paged_gpu: JAX {jax.__version__} has no paged attention for "
                "GPUs any more; expected paged or dense"
            ) from error
    return paged_attention


@config
class PagedGPU(Paged):
    """A paged cache; JAX's paged attention for GPUs runs the decoding steps."""

    kind: Literal["paged_gpu"] = "paged_gpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values in the model's dtype."""

    heads_axis = 0

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Return a layer's empty pool; raise UserError for an unsupported model."""
        width, size = c.head_dim, self.page_size
        if width < LEAST or width & (width - 1) or size < LEAST or size & (size - 1):
            raise UserError(
                f"rollout.cache.kind=paged_gpu needs a head width and a page_size that are powers "
                f"of 2 from {LEAST} on, here they are {width} and {size}; expected another "
                "page_size, paged or dense"
            )
        if any(kind.window is not None for kind in c.kinds):
            raise UserError(
                "rollout.cache.kind=paged_gpu does not support sliding windows, which this model "
                "has; expected paged or dense"
            )
        shape = (c.num_key_value_heads, count, size, width)
        return tuple(jnp.zeros(shape, c.dtype) for _ in range(2))

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write full pages; return keys and values as later reads give them, and the pool."""
        new = finite(k), finite(v)

        def write(pool: Array, leaf: Array) -> Array:
            rows, heads, _, width = leaf.shape
            pages = leaf.reshape(rows, heads, at.shape[1], self.page_size, width).swapaxes(0, 1)
            return pool.at[:, at].set(pages, mode="drop")

        return new, tuple(write(pool, leaf) for pool, leaf in zip(kept, new, strict=True))

    def _write_tokens(self, kept: Any, page: Array, at: Array, k: Array, v: Array) -> Any:
        """Return the pool with one token of each row written to its page."""

        def write(pool: Array, leaf: Array) -> Array:
            return pool.at[:, page, at].set(finite(leaf)[:, :, 0].swapaxes(0, 1), mode="drop")

        return tuple(write(pool, leaf) for pool, leaf in zip(kept, (k, v), strict=True))

    def _copy_page(self, pool: Array, to: Array, source: Array) -> Array:
        """Return the pool with pages copied."""
        return pool.at[:, to].set(pool[:, source], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return keys and values of the rows, [B, K, S, H]."""

        def gather(pool: Array) -> Array:
            pages = pool[:, jnp.minimum(tables, pool.shape[1] - 1)]
            heads, rows, count, page, width = pages.shape
            return pages.reshape(heads, rows, count * page, width).swapaxes(0, 1)

        keys, values = (gather(pool) for pool in kept)
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
        splits = math.gcd(tables.shape[1], SPLITS)
        with precisely(dtype):
            out = library().paged_attention(
                q[:, 0] * scale,
                *kept,
                jnp.minimum(tables, kept[0].shape[1] - 1),
                position + 1,
                k_splits=splits,
                pages_per_compute_block=math.gcd(tables.shape[1] // splits, PAGES),
            )
        return out[:, None]
