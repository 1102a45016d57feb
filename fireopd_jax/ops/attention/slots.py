"""Attention over a cache, in plain JAX: over given slots, or of a piece of a prompt to its past."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int32

from fireopd_jax.ops.attention.chunked import MASKED, Softmax, folded, nothing, product
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.runtime.target import platform
from fireopd_jax.types import Array

COLUMNS = 256
"""Columns of a cache in one block of a decoding step."""
Keys = Float[Array, "B K S H"]


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
    shape, group, width = q.shape, q.shape[2] // k.shape[1], q.shape[3]
    q = _by_key_head(q, k.shape[1])
    precision = precision_of(jnp.promote_types(q.dtype, k.dtype))
    scores = jnp.einsum(
        "bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32, precision=precision
    )
    allowed = jnp.tile(mask, (1, group, 1))[:, None]
    scores = jnp.where(allowed, scores * (width**-0.5 if scale is None else scale), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkts,bksh->bkth", weights, v, precision=precision)
    return _by_query(out, shape)


def attend_to_past(
    q: Float[Array, "B T N H"],
    own: tuple[Keys, Keys],
    past: Callable[[jax.Array], tuple[Keys, Keys]] | None,
    start: Int32[Array, ""],
    window: int | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return causal attention of T tokens of each row to themselves and to the `start` before them.

    `own` are their keys and values; `past(j)` those of the tokens j T to (j + 1) T - 1, and `start`
    is a multiple of T; None if it is always 0. Only the blocks of the past that the window reaches
    are asked for, so memory and time follow the tokens that are there, not the room of the cache.
    Otherwise as `attend`.

    References: arXiv 2205.14135 (the online softmax).
    """
    shape, heads = q.shape, own[0].shape[1]
    length, group = shape[1], shape[2] // heads
    at, factor = jnp.arange(length), shape[3] ** -0.5 if scale is None else scale
    distance = at[:, None] - at[None]
    if past is None:
        mask = jnp.broadcast_to(visible_keys(distance, window)[None], (shape[0], length, length))
        return attend(q, *own, mask, scale)
    q = _by_key_head(q, heads)

    def fold(carry: Softmax, keys: Array, values: Array, first: Array) -> Softmax:
        scores = product("bkth,bksh->bkts", q, keys) * factor
        mask = jnp.tile(visible_keys(start - first + distance, window), (group, 1))
        return folded(carry, jnp.where(mask, scores, MASKED), values)

    reach = 0 if window is None else jnp.maximum(start - window + 1, 0) // length
    carry = fold(nothing(q), *own, start)
    _, mass, total = lax.fori_loop(
        reach, start // length, lambda j, carry: fold(carry, *past(j), j * length), carry
    )
    return _by_query((total / mass[..., None]).astype(own[1].dtype), shape)


def attend_step(
    q: Float[Array, "B 1 N H"],
    columns: Callable[[jax.Array | int, int], tuple[Keys, Keys]],
    heads: int,
    length: int,
    position: Int32[Array, " B"],
    window: int | None = None,
    scale: float | None = None,
    multiple: int = 1,
) -> Float[Array, "B 1 N H"]:
    """Return attention of each row's token at `position` to the tokens up to it, in a cache.

    The cache has `heads` key heads and `length` columns, of which column p holds a row's token p;
    `columns(start, size)` are keys and values of `size` of them, both multiples of `multiple`, as
    `length` is. On a CPU, blocks that no row attends to are not asked for: the time of a step
    follows the longest row that is there, not the room of the cache. On other platforms a step
    reads all columns at once, since each turn of a loop costs them more. Otherwise as `attend`.
    """
    size = COLUMNS // multiple * multiple or multiple
    if platform() != "cpu" or length <= size:
        mask = visible_keys(position[:, None] - jnp.arange(length)[None], window)[:, None]
        return jnp.asarray(attend(q, *columns(0, length), mask, scale))
    shape, factor = q.shape, q.shape[3] ** -0.5 if scale is None else scale
    q = _by_key_head(q, heads)

    def fold(j: Array, carry: Softmax) -> Softmax:
        start = jnp.minimum(j * size, length - size)  # the last block may begin in the one before
        keys, values = columns(start, size)
        at = (start + jnp.arange(size))[None]
        mask = visible_keys(position[:, None] - at, window) & (at >= j * size)
        scores = product("bkth,bksh->bkts", q, keys) * factor
        return folded(carry, jnp.where(mask[:, None, None], scores, MASKED), values)

    reach = 0 if window is None else jnp.maximum(position.min() - window + 1, 0) // size
    _, mass, total = lax.fori_loop(reach, position.max() // size + 1, fold, nothing(q))
    return _by_query((total / mass[..., None]).astype(q.dtype), shape)


def visible_keys(distance: Int32[Array, "*B S"], window: int | None) -> Bool[Array, "*B S"]:
    """Return which keys a query attends to, given how many positions they are before it."""
    past = distance >= 0
    return past if window is None else past & (distance < window)


def _by_key_head(q: Float[Array, "B T N H"], heads: int) -> Float[Array, "B K M H"]:
    """Return the queries that share a key head as M = G T rows of one matrix."""
    rows, length, queries, width = q.shape
    q = q.reshape(rows, length, heads, queries // heads, width).transpose(0, 2, 3, 1, 4)
    return q.reshape(rows, heads, -1, width)


def _by_query(out: Float[Array, "B K M H"], shape: tuple[int, ...]) -> Float[Array, "B T N H"]:
    """Return the inverse of `_by_key_head` for queries of a shape [B, T, N, H]."""
    rows, length, queries, width = shape
    group = queries // out.shape[1]
    out = out.reshape(rows, -1, group, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, length, queries, width)
