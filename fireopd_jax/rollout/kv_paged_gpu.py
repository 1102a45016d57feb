"""Pages as JAX's paged attention for GPUs wants them, which then does the decoding.

    a layer's pool: keys and values, each [K, N, page, H]

Prompts are attended to as with any pages; only the step of one token a slot is the kernel's. It is
written for Pallas' Triton backend, which JAX 0.12 calls deprecated.
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
"""The kernel multiplies blocks no narrower than this."""
SPLITS, PAGES = 16, 8
"""Parts of a row's pages that are attended to in parallel, and pages that are read at a time."""


def library() -> Any:
    """Import the kernel where it is wanted: it brings all of Pallas."""
    with warnings.catch_warnings():
        # From JAX 0.11 on the module announces that it will go; nothing is named in its place.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            from jax.experimental.pallas.ops.gpu import paged_attention
        except ImportError as error:
            raise UserError(
                f"rollout.cache.kind=paged_gpu: JAX {jax.__version__} no longer brings paged "
                "attention for GPUs; expected paged or dense"
            ) from error
    return paged_attention


@config
class PagedGPU(Paged):
    """Pages, decoded by a kernel of JAX's for GPUs."""

    kind: Literal["paged_gpu"] = "paged_gpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values as the model computes them."""

    heads_axis = 0

    def _empty(self, c: DecoderConfig, count: int) -> Any:
        """Allocate a layer's pool."""
        width, size = c.head_dim, self.page_size
        if width < LEAST or width & (width - 1) or size < LEAST or size & (size - 1):
            raise UserError(
                f"rollout.cache.kind=paged_gpu takes heads and pages of a power of 2 from {LEAST} "
                f"on, here they are {width} and {size}; expected another page_size, paged or dense"
            )
        if any(kind.window is not None for kind in c.kinds):
            raise UserError(
                "rollout.cache.kind=paged_gpu knows no sliding window, which the model has; "
                "expected paged or dense"
            )
        shape = (c.num_key_value_heads, count, size, width)
        return tuple(jnp.zeros(shape, c.dtype) for _ in range(2))

    def _write_pages(
        self, kept: Any, at: Int32[Array, "R P"], k: Array, v: Array, dtype: jnp.dtype
    ) -> tuple[tuple[Array, Array], Any]:
        """Write whole pages; give the keys and values as they will be read, and the pool."""
        new = finite(k), finite(v)

        def write(pool: Array, leaf: Array) -> Array:
            rows, heads, _, width = leaf.shape
            pages = leaf.reshape(rows, heads, at.shape[1], self.page_size, width).swapaxes(0, 1)
            return pool.at[:, at].set(pages, mode="drop")

        return new, tuple(write(pool, leaf) for pool, leaf in zip(kept, new, strict=True))

    def _write_tokens(self, kept: Any, page: Array, at: Array, k: Array, v: Array) -> Any:
        """Write one token of each row into its page."""

        def write(pool: Array, leaf: Array) -> Array:
            return pool.at[:, page, at].set(finite(leaf)[:, :, 0].swapaxes(0, 1), mode="drop")

        return tuple(write(pool, leaf) for pool, leaf in zip(kept, (k, v), strict=True))

    def _copy_page(self, pool: Array, to: Array, source: Array) -> Array:
        """Copy whole pages."""
        return pool.at[:, to].set(pool[:, source], mode="drop")

    def _rows(self, kept: Any, tables: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Lay the pages of each row side by side: [B, K, S, H]."""

        def lay(pool: Array) -> Array:
            pages = pool[:, jnp.minimum(tables, pool.shape[1] - 1)]
            heads, rows, count, page, width = pages.shape
            return pages.reshape(heads, rows, count * page, width).swapaxes(0, 1)

        keys, values = (lay(pool) for pool in kept)
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
