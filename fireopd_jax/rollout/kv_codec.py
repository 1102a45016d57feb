"""What a cache keeps of keys and values: the values themselves, or 8-bit integers and their scales.

    x[..., H] -> (x,)        or        (round(127 x / max|x|), max|x| / 127)

Nothing that is not finite enters a cache: a masked slot has weight 0, and 0 times NaN is NaN, so
one request's overflow would reach the next that sits in its place. NaN becomes the largest number,
which overflows again in whoever may see it: its own row still ends.
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array

KVType = Literal["model", "int8"]
Leaves = tuple[Array, ...]
"""The arrays that stand for one tensor; all but the last axis are the tensor's."""


def encode(x: Array, kind: KVType) -> Leaves:
    """Turn values [..., H] into what is kept; int8 has one float32 scale a vector."""
    x = finite(x)
    if kind == "model":
        return (x,)
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1, keepdims=True) / 127
    return jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def finite(x: Array) -> Array:
    """Replace what is not finite by the largest number of the type."""
    return jnp.nan_to_num(x, nan=float(jnp.finfo(x.dtype).max))


def decode(leaves: Leaves, dtype: jnp.dtype) -> Array:
    """Turn what is kept into values [..., H]."""
    if len(leaves) == 1:
        return leaves[0]
    return (leaves[0].astype(jnp.float32) * leaves[1]).astype(dtype)


def widths(head_dim: int, kind: KVType, dtype: jnp.dtype) -> tuple[tuple[int, jnp.dtype], ...]:
    """Tell the last axis and the type of each array that is kept."""
    if kind == "model":
        return ((head_dim, jnp.dtype(dtype)),)
    return (head_dim, jnp.dtype(jnp.int8)), (1, jnp.dtype(jnp.float32))
