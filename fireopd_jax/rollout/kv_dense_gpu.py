"""A dense KV cache in the layout of cuDNN's attention, which runs the decoding steps.

    keys and values: [rows, S, K, H] each

cuDNN gets the number of used positions of each slot, so it does not read the whole capacity.
Prefill works as in every dense cache; cuDNN runs only the steps of one token for each slot.
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
"""Head widths that cuDNN supports on every GPU: multiples of the first, up to the second."""


@config
class DenseGPU(Dense):
    """A dense cache; cuDNN's attention runs the decoding steps."""

    kind: Literal["dense_gpu"] = "dense_gpu"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: Literal["model"] = "model"
    """Keys and values in the model's dtype."""

    heads_axis = 2
    axes = (1, 1)
    implementation = "cudnn"
    """Argument of `jax.nn.dot_product_attention`."""

    def _empty(self, c: DecoderConfig, rows: int, capacity: int) -> tuple[Leaves, Leaves]:
        """Return a layer's empty buffers; raise UserError for an unsupported model."""
        if c.dtype not in TYPES or c.head_dim % MULTIPLE or c.head_dim > WIDEST:
            raise UserError(
                f"rollout.cache.kind=dense_gpu supports {' or '.join(TYPES)} and head widths that "
                f"are multiples of {MULTIPLE} up to {WIDEST}, this model has {c.dtype} and "
                f"{c.head_dim}; expected dense or paged"
            )
        if any(kind.window is not None for kind in c.kinds):
            raise UserError(
                "rollout.cache.kind=dense_gpu does not support sliding windows, which this model "
                "has; expected dense or paged"
            )
        shape = (rows, capacity, c.num_key_value_heads, c.head_dim)
        return (jnp.zeros(shape, c.dtype),), (jnp.zeros(shape, c.dtype),)

    def _encode(self, k: Array, v: Array) -> tuple[Leaves, Leaves]:
        """Return the stored form of keys and values [B, K, S, H]."""
        return (finite(k).swapaxes(1, 2),), (finite(v).swapaxes(1, 2),)

    def _decode(self, kept: tuple[Leaves, Leaves], dtype: jnp.dtype) -> tuple[Array, Array]:
        """Return keys and values [B, K, S, H]."""
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
        """Return attention of each row's token at `position` to all positions up to it."""
        settings: dict[str, Any] = {"implementation": self.implementation, "scale": scale}
        return jax.nn.dot_product_attention(
            q,
            kept[0][0],
            kept[1][0],
            query_seq_lengths=jnp.ones_like(position),
            key_value_seq_lengths=position + 1,
            **settings,
        )
