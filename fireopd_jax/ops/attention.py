"""Attention over given keys and values: the one place where a library kernel may take over."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fireopd_jax.types import Array


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Mix values by softmax(q k / sqrt(H)) over the allowed slots; N query heads share K key heads.

    Scores and softmax are float32. A query that may see nothing gets a plain mean (its row is padding).
    """
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, k.shape[1], heads // k.shape[1], width)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weights, v).reshape(q.shape)
