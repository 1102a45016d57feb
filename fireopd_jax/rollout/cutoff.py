"""Exact thresholds of top-k and top-p, without sorting the vocabulary.

    256 largest logits -> the threshold, if it is among them        (nearly always)
    else bisection: smallest t with measure(logits > t) < limit, over the bits of float32

Tokens are ranked by logit, equal logits by token id. Both filters keep a prefix of that ranking, so
a threshold is the last token kept: a logit and an id. Top-k keeps exactly k tokens. Top-p keeps
every token whose predecessors in the ranking have less than p of the mass of the top-k tokens.

The measure is a count for top-k and a probability mass for top-p. Its float32 sum over a fixed tree
is monotone in t, so the bisection is exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.ops import topk
from fireopd_jax.rollout.columns import BlockMass, Columns
from fireopd_jax.types import Array, pytree

CANDIDATES = 256
"""Tokens that are ranked; the whole vocabulary, if it has fewer than twice as many."""
LEAST = 1e-30
"""Smallest limit of top-p: less than the mass of any first token, so p = 0 keeps one token."""


@pytree
class Cut:
    """The last token in the ranking that a row keeps."""

    value: Float32[Array, " B"]
    """Its logit."""
    tie: Int32[Array, " B"]
    """Its token id."""

    def keeps(
        self, z: Float32[Array, "B ..."], ids: Int32[Array, "#B ..."]
    ) -> Bool[Array, "B ..."]:
        """Return which tokens are kept: those that rank no lower."""
        shape = (-1, *[1] * (z.ndim - 1))
        value, tie = self.value.reshape(shape), self.tie.reshape(shape)
        return (z > value) | ((z == value) & (ids <= tie))


def no_cut(like: Float32[Array, " B"]) -> Cut:
    """Return the threshold that keeps every token."""
    return Cut(jnp.full_like(like, -jnp.inf), jnp.full_like(like, 2**31 - 1, jnp.int32))


def find_cut(
    z: Float32[Array, "B N block"],
    weights: BlockMass,
    top_k: Int32[Array, " B"],
    top_p: Float32[Array, " B"],
    columns: Columns,
) -> Cut:
    """Return each row's threshold for top-k (0: off), followed by top-p (1: off).

    `weights` is the block mass of `z`. Rows with NaN or infinite logits get an arbitrary threshold.
    """
    k = jnp.where((top_k <= 0) | (top_k >= columns.size), columns.size, top_k)
    value, ids = _candidates(z, columns)
    found = value.shape[1]
    rank = jnp.arange(found, dtype=jnp.int32)[None]
    mass = jnp.where(rank < k[:, None], jnp.exp(value - weights.top[:, None]), 0)
    upto = jnp.cumsum(mass, axis=1)
    total = jnp.where(k < columns.size, upto.max(axis=1), weights.total)
    limit = jnp.where(top_p < 1, jnp.maximum(top_p * total, LEAST), jnp.inf)
    kept = ((rank < k[:, None]) & (upto - mass < limit[:, None])).sum(axis=1, dtype=jnp.int32)
    last = jnp.clip(kept - 1, 0)[:, None]
    on = (k < columns.size) | (top_p < 1)
    among = Cut(
        columns.max(jnp.where(on, jnp.take_along_axis(value, last, axis=1)[:, 0], -jnp.inf)),
        columns.max(jnp.where(on, jnp.take_along_axis(ids, last, axis=1)[:, 0], columns.size)),
    )
    if found >= columns.size:
        return among
    # The threshold is beyond the candidates if k is, or if they have less mass than p.
    short = jnp.where(k < columns.size, k > found, (top_p < 1) & (upto.max(axis=1) < limit))
    short = columns.max((short & jnp.isfinite(weights.total)).astype(jnp.int32)) > 0

    def search(_: Cut) -> Cut:
        beyond = _search(z, weights, k, top_p, short, columns)
        return jax.tree.map(lambda a, b: jnp.where(short, a, b), beyond, among)

    return lax.cond(short.any(), search, lambda cut: cut, among)


def _candidates(
    z: Float32[Array, "B N block"], columns: Columns
) -> tuple[Float32[Array, "B K"], Int32[Array, "B K"]]:
    """Return the largest logits of the vocabulary and their ids: per shard first, then of those."""
    rows = len(z)
    count = columns.size if columns.size < 2 * CANDIDATES else CANDIDATES
    # The ranking treats zeros of both signs as equal, but top-k functions may not.
    flat = jnp.where(z == 0, 0.0, z).reshape(rows, -1)
    best = topk.empty(rows, min(count, flat.shape[1]))
    value, ids = topk.update(best, flat, columns.first())
    if columns.axis is None:
        return value, ids
    # Shards are in the order of token ids, so equal logits stay in that order.
    value, ids = columns.gather(value), columns.gather(ids)
    value, at = lax.top_k(value, min(count, columns.size))
    return value, jnp.take_along_axis(ids, at, axis=1)


def _search(
    z: Array, weights: BlockMass, k: Array, top_p: Array, short: Array, columns: Columns
) -> Cut:
    """Return the thresholds of the rows in `short` by bisection, anywhere in the ranking."""
    weight = jnp.exp(z - weights.top[:, None, None])
    lowest, highest = _key(jnp.full_like(weights.top, -jnp.inf)), _key(weights.top)

    def count(kept: Array) -> Array:
        return columns.sum(kept.sum(axis=(1, 2), dtype=jnp.int32))

    def above(t: Array) -> Array:
        """Sum the weights above t block by block, which rounds less than one long sum."""
        kept = jnp.where(z > t[:, None, None], weight, 0).sum(axis=-1)
        return columns.sum(kept.sum(axis=-1))

    by_k = short & (k < columns.size)
    low = _smallest(
        lambda t: count(z > _value(t)[:, None, None]) < k,
        jnp.where(by_k, lowest, highest),
        highest,
    )
    at = _value(low)
    room = k - count(z > at[:, None, None])
    total = jnp.where(by_k, above(at) + room * jnp.exp(at - weights.top), weights.total)

    by_p = short & (top_p < 1)
    limit = jnp.maximum(top_p * total, LEAST)
    start = jnp.where(by_k, low, lowest)
    end = _smallest(
        lambda t: above(_value(t)) < limit,
        jnp.where(by_p, start, highest),
        highest,
    )
    cut = _value(jnp.where(by_p, end, low))
    # Of tokens equal to the threshold, keep those with predecessors below the limit, k in all.
    needed = jnp.ceil((limit - above(cut)) / jnp.exp(cut - weights.top))
    needed = jnp.clip(needed, 1, columns.size).astype(jnp.int32)
    keep = jnp.where(by_p, needed, room)
    keep = jnp.where(by_k & (cut == at), jnp.minimum(keep, room), keep)
    equal, ids = z == cut[:, None, None], columns.ids()
    most = jnp.full_like(low, columns.size - 1)
    tie = _smallest(
        lambda id: count(equal & (ids <= id[:, None, None])) >= keep,
        jnp.where(short & (count(equal) > keep), 0, most),
        most,
    )
    return Cut(cut, tie)


def _smallest(
    holds: Callable[[Int32[Array, " B"]], Bool[Array, " B"]],
    low: Int32[Array, " B"],
    high: Int32[Array, " B"],
) -> Int32[Array, " B"]:
    """Return each row's smallest integer in [low, high] for which `holds` is true, by bisection.

    `holds` must be monotone; it is assumed to be true of `high`.
    """

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # floor of the mean, without overflow
        good = holds(middle)
        return jnp.where(good, low, jnp.minimum(middle + 1, high)), jnp.where(good, middle, high)

    return lax.while_loop(lambda bounds: (bounds[0] < bounds[1]).any(), narrow, (low, high))[1]


def _key(value: Float32[Array, " B"]) -> Int32[Array, " B"]:
    """Return integers in the order of the floats."""
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return bits ^ jnp.where(bits < 0, jnp.int32(0x7FFFFFFF), 0)


def _value(key: Int32[Array, " B"]) -> Float32[Array, " B"]:
    """Return the floats of `_key`'s integers."""
    return lax.bitcast_convert_type(key ^ jnp.where(key < 0, jnp.int32(0x7FFFFFFF), 0), jnp.float32)
