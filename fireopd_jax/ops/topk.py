"""Exact running top-K over chunks of columns, in the order of `lax.top_k`: ties by lowest id.

    chunk [N, C] -> maximum of each group; the current list and the maxima -> at most K groups
    the current list, then the columns of those groups -> `lax.top_k` -> the new list

A column outside the chosen groups is smaller than K entries of the list or maxima of other groups,
so it cannot enter. The list is in front and the groups are in ascending order, so equals stay in
ascending order of id. No whole row is sorted. Where `lax.top_k` keeps a heap, as on a CPU, a list
in front that is already good also avoids most insertions.

Slices of `lax.top_k(...)`, such as `[..., -1:]`, compile to a full sort on some platforms; only
whole lists are used here.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int32

from fireopd_jax.types import Array

WIDEST_GROUP = 128
NARROWEST_GROUP = 8

TopKList = tuple[Float32[Array, "N K"], Int32[Array, "N K"]]


def empty(tokens: int, k: int) -> TopKList:
    """Return the list (values [N, K], ids [N, K]) of no columns: -inf and -1."""
    return jnp.full((tokens, k), -jnp.inf, jnp.float32), jnp.full((tokens, k), -1, jnp.int32)


def update(best: TopKList, values: Float32[Array, "N C"], first: Array | int) -> TopKList:
    """Return the list updated with the columns [first, first + C).

    They must come after all columns in the list.
    """
    tokens, width = values.shape
    k = best[0].shape[1]
    if size := _group_size(width, k):
        values, ids = _candidates(best[0], values, size, first)
    else:
        ids = jnp.broadcast_to(first + jnp.arange(width, dtype=jnp.int32), (tokens, width))
    values = jnp.concatenate([best[0], values], axis=1)
    ids = jnp.concatenate([best[1], ids], axis=1)
    values, at = lax.top_k(values, k)
    return values, jnp.take_along_axis(ids, at, axis=1)


def _group_size(width: int, k: int) -> int:
    """Return the group width: K groups hold at most twice as many columns as there are groups.

    Both stages are then short. 0 if the groups would be too narrow to help.
    """
    size = WIDEST_GROUP
    while k * size * size > 2 * width:
        size //= 2
    return size if size >= NARROWEST_GROUP else 0


def _candidates(
    threshold: Array, values: Array, size: int, first: Array | int
) -> tuple[Array, Array]:
    """Return values and ids of the groups that may hold a top-K entry, and of the last columns."""
    tokens, width = values.shape
    k = threshold.shape[1]
    count = width // size
    groups = values[:, : count * size].reshape(tokens, count, size)
    _, at = lax.top_k(jnp.concatenate([threshold, groups.max(axis=2)], axis=1), k)
    # An entry of the list needs no group: `count`, which sorts last, marks it.
    chosen = jnp.sort(jnp.where(at < k, count, at - k), axis=1)
    taken = (chosen < count)[:, :, None]
    read = jnp.minimum(chosen, count - 1)[:, :, None]
    columns = read * size + jnp.arange(size, dtype=jnp.int32)[None, None, :]
    found = jnp.take_along_axis(groups, read, axis=1)
    found = jnp.where(taken, found, -jnp.inf).reshape(tokens, k * size)
    columns = jnp.where(taken, columns, -1 - first).reshape(tokens, k * size)
    if rest := width - count * size:
        last = jnp.arange(count * size, width, dtype=jnp.int32)
        found = jnp.concatenate([found, values[:, count * size :]], axis=1)
        columns = jnp.concatenate([columns, jnp.broadcast_to(last, (tokens, rest))], axis=1)
    return found, columns + first
