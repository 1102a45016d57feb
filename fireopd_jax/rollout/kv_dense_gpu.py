"""A dense cache as cuDNN's attention wants it, which then does the decoding.

    keys and values: [rows, S, K, H] each

It is told how many positions of a slot are alive, so as not to read all that there is room for.
Prompts are attended to as with any dense cache; only the step of one token a slot is cuDNN's.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from fireopd_jax.config import UserError, config
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.rollout.kv_codec import Leaves, finite
from fireopd_jax.rollout.kv_dense import Dense

TYPES = ("bfloat16",)
MULTIPLE, WIDEST = 8, 128
"""Heads that cuDNN takes on every GPU: a multiple of so many, and no wider."""


@config
class DenseGPU(Dense):
    """A dense cache, decoded by cuDNN."""

    kind: Literal["dense_gpu"] = "dense_gpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values as the model computes them."""

    heads_axis = 2
    axes = (1, 1)
    implementation = "cudnn"
    """Of `jax.nn.dot_product_attention`."""

    def _empty(self, c: DecoderConfig, rows: int, capacity: int) -> tuple[Leaves, Leaves]:
        """Allocate a layer's buffers."""
        if c.dtype not in TYPES or c.head_dim % MULTIPLE or c.head_dim > WIDEST:
            raise UserError(
                f"rollout.cache.kind=dense_gpu takes models in {' or '.join(TYPES)}, with heads of "
                f"a multiple of {MULTIPLE} up to {WIDEST}, here they are {c.dtype} and "
                f"{c.head_dim}; expected dense or paged"
            )
        if any(kind.window is not None for kind in c.kinds):
            raise UserError(
                "rollout.cache.kind=dense_gpu knows no sliding window, which the model has; "
                "expected dense or paged"
            )
        shape = (rows, capacity, c.num_key_value_heads, c.head_dim)
        return (jnp.zeros(shape, c.dtype),), (jnp.zeros(shape, c.dtype),)

    def _keep(self, k: Array, v: Array) -> tuple[Leaves, Leaves]:
        """Turn keys and values [B, K, S, H] into what is kept."""
        return (finite(k).swapaxes(1, 2),), (finite(v).swapaxes(1, 2),)

    def _read(self, kept: tuple[Leaves, Leaves], dtype: jnp.dtype) -> tuple[Array, Array]:
        """Turn what is kept into keys and values [B, K, S, H]."""
        return kept[0][0].swapaxes(1, 2), kept[1][0].swapaxes(1, 2)

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
        settings: dict[str, Any] = {"implementation": self.implementation, "scale": scale}
        return jax.nn.dot_product_attention(
            q,
            kept[0][0],
            kept[1][0],
            query_seq_lengths=jnp.ones_like(position),
            key_value_seq_lengths=position + 1,
            **settings,
        )
