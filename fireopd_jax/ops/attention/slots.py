"""Masked attention over given keys and values, in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T) v over the slots that `mask` allows, in the dtype of `v`.

    Grouped-query attention: B rows, T queries, S key slots, head width H; each of the K key heads
    serves N / K query heads. `scale` is 1 / sqrt(H) by default. Scores and softmax are float32. A
    query with no allowed slot (padding) returns the mean of all values.

    References: arXiv 2305.13245 (grouped-query attention).
    """
    rows, length, heads, width = q.shape
    group = heads // k.shape[1]
    # [B, K, G T, H]: the queries that share a key head become rows of one matrix.
    q = q.reshape(rows, length, -1, group, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, -1, group * length, width)
    precision = precision_of(jnp.promote_types(q.dtype, k.dtype))
    scores = jnp.einsum(
        "bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32, precision=precision
    )
    allowed = jnp.tile(mask, (1, group, 1))[:, None]
    scores = jnp.where(allowed, scores * (width**-0.5 if scale is None else scale), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkts,bksh->bkth", weights, v, precision=precision)
    out = out.reshape(rows, -1, group, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, length, heads, width)
