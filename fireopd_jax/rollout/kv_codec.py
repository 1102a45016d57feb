"""Storage formats of keys and values: the model's dtype, or int8 with a scale for each vector.

    x[..., H] -> (x,)        or        (round(127 x / max|x|), max|x| / 127)

Stored values are finite. A masked position has weight 0 in attention, and 0 times NaN is NaN, so a
NaN of one request would reach the next request in its slot. NaN becomes the largest finite number,
which overflows again in the logits of its own row, so that row still ends as `not_finite`.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array

KVType = Literal["model", "int8"]
Leaves = tuple[Array, ...]
"""The arrays that store one tensor; they have its axes but for the size of the last."""


def encode(x: Array, kind: KVType) -> Leaves:
    """Return the stored form of values [..., H]; int8 has one float32 scale for each vector."""
    x = finite(x)
    if kind == "model":
        return (x,)
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1, keepdims=True) / 127
    return jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def finite(x: Array) -> Array:
    """Return x with NaN and infinities replaced by the largest finite values of its dtype."""
    return jnp.nan_to_num(x, nan=float(jnp.finfo(x.dtype).max))


def decode(leaves: Leaves, dtype: jnp.dtype) -> Array:
    """Return the values [..., H] of the stored form."""
    if len(leaves) == 1:
        return leaves[0]
    return (leaves[0].astype(jnp.float32) * leaves[1]).astype(dtype)


def widths(head_dim: int, kind: KVType, dtype: jnp.dtype) -> tuple[tuple[int, jnp.dtype], ...]:
    """Return size of the last axis and dtype of each stored array."""
    if kind == "model":
        return ((head_dim, jnp.dtype(dtype)),)
    return (head_dim, jnp.dtype(jnp.int8)), (1, jnp.dtype(jnp.float32))
