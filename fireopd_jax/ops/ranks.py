"""Order statistics of masked values: quantiles, ranks, medians by id, repeated n-grams."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.types import Array


def masked_quantile(
    values: Float32[Array, "*S"], mask: Bool[Array, "*S"], fraction: float
) -> Float32[Array, ""]:
    """Return the interpolated quantile of the finite values where `mask`; inf if there are none."""
    return masked_quantiles(values, mask, (fraction,))[0]


def masked_quantiles(
    values: Float32[Array, "*S"], mask: Bool[Array, "*S"], fractions: Sequence[float]
) -> list[Float32[Array, ""]]:
    """Return `masked_quantile` at several fractions in [0, 1], with one sort of the values."""
    inside = mask & jnp.isfinite(values)
    ordered = jnp.sort(jnp.where(inside, values, jnp.inf).reshape(-1))
    last = jnp.maximum(inside.sum() - 1, 0)

    def at(fraction: float) -> Float32[Array, ""]:
        place = fraction * last
        low = jnp.floor(place).astype(jnp.int32)
        high = jnp.ceil(place).astype(jnp.int32)
        between = place - low
        return jnp.where(
            between > 0, ordered[low] + between * (ordered[high] - ordered[low]), ordered[low]
        )

    return [at(fraction) for fraction in fractions]


def ranks(values: Float32[Array, "B T"], mask: Bool[Array, "B T"]) -> Int32[Array, "B T"]:
    """Return the rank of each value in its row, from 0 for the lowest, stable; masked ones last."""
    order = jnp.lexsort((values, ~jnp.asarray(mask)), axis=-1)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def median_by_id(
    ids: Int32[Array, " N"], values: Float32[Array, " N"], mask: Bool[Array, " N"]
) -> tuple[Float32[Array, " N"], Int32[Array, " N"]]:
    """Return the lower median of the values with each element's id, and their number.

    Elements where `mask` is false are in no group and return 0 and 0.
    """
    count = ids.shape[0]
    order = jnp.lexsort((values, ids, ~jnp.asarray(mask)))
    sorted_ids, there = jnp.asarray(ids)[order], jnp.asarray(mask)[order]
    place = jnp.arange(count)
    new = (sorted_ids != jnp.roll(sorted_ids, 1)) | (place == 0) | (there != jnp.roll(there, 1))
    start = jax.lax.cummax(jnp.where(new, place, 0))
    group = jnp.cumsum(new) - 1
    size = jnp.zeros(count, jnp.int32).at[group].add(there.astype(jnp.int32))[group]
    median = jnp.asarray(values)[order][start + jnp.maximum(size - 1, 0) // 2]
    back = jnp.zeros(count, order.dtype).at[order].set(place.astype(order.dtype))
    return jnp.where(there, median, 0.0)[back], jnp.where(there, size, 0)[back]


def repetition_rate(
    tokens: Int32[Array, "B T"], mask: Bool[Array, "B T"], n: int
) -> Float32[Array, " B"]:
    """Return the fraction of each row's n-grams that occurred earlier in the row, in [0, 1].

    Only n-grams whose tokens are all unmasked count; a row with none returns 0. Exact: n-grams are
    sorted, not hashed.
    """
    rows, width = tokens.shape
    tokens = jnp.asarray(tokens)
    grams = [jnp.pad(tokens[:, i:], ((0, 0), (0, i))) for i in range(min(n, width))]
    real = jnp.pad(jnp.asarray(mask), ((0, 0), (0, n)))
    whole = jnp.stack([real[:, i : i + width] for i in range(n)]).all(axis=0)
    order = jnp.lexsort((*grams, ~whole), axis=-1)
    ordered = [jnp.take_along_axis(gram, order, axis=1) for gram in grams]
    there = jnp.take_along_axis(whole, order, axis=1)
    same = jnp.ones((rows, width), bool).at[:, 0].set(False)
    for gram in ordered:
        same &= gram == jnp.roll(gram, 1, axis=1)
    repeated = jnp.sum(same & there & jnp.roll(there, 1, axis=1), axis=1)
    return repeated / jnp.maximum(jnp.sum(whole, axis=1), 1).astype(jnp.float32)
