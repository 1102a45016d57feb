"""The Pallas TPU kernels, on one tile of logits.

    statistics  logits [columns, tokens] -> m, s, t, weight [1, tokens], top-K [K, tokens]
    picks       logits [tokens, columns] -> m, s, t and the logits at wanted ids [tokens, 128]

A grid step (i, v) multiplies the rows of the head in tile v with the hidden states of token block
i, and folds the logits into outputs that stay in VMEM for the whole sweep over v. Reductions run
over whole registers of 8 sublanes by 128 lanes, so the vocabulary is on the sublanes; but a
register can be gathered from only along lanes, so the vocabulary is on the lanes where logits are
read at ids.

Ids are floats, exact below 2^24, because a minimum of floats is one instruction.

For 512 x 512 logits of width 4096 and K = 16 a v5e multiplies for 16384 cycles; statistics and bins
are 770 instruction words, one step of the extraction loop 180. Computing the statistics of the last
tile during the product of this one would hide the former and add twice as many instructions to the
product, whose units seem to have spare cycles; without a TPU to time it, it was left out.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fireopd_jax.ops.logits import dot
from fireopd_jax.ops.partials import LOWEST, weight
from fireopd_jax.types import Array

Ref = Any
"""Reference to a block in VMEM or SMEM."""
SUBLANES, LANES = 8, 128
SLAB = 64
"""Sublanes of 512 tokens that fit into the registers with their intermediate values."""
BINNED_K = 32
"""Largest K for which bins are used: two of the top-K rarely share one."""
FOLD = 4
"""Columns of a tile in one bin."""


def statistics(
    numbers: Ref,
    columns: Ref,
    hidden: Ref,
    head: Ref,
    factor: Ref,
    max_logit: Ref,
    sum_exp: Ref,
    sum_exp_logit: Ref,
    weights: Ref,
    *rest: Ref,
    tokens: int,
    vocabulary: int,
    softcap: float | None,
    width: int,
    k: int,
) -> None:
    """Fold one tile into the statistics and lists of its tokens.

    `numbers` are (scale, alpha), `columns` is how many exist, `factor` is 1 + beta c^S. `rest` are
    the values and ids of the lists if k > 0, the tile of logits, and if k <= `BINNED_K` the scratch
    of `_update_lists`.
    """
    best, (logits, *bins) = rest[: 2 * (k > 0)], rest[2 * (k > 0) :]
    tile, tiles = pl.program_id(1), pl.num_programs(1)
    first = tile * logits.shape[0]
    left = tokens - pl.program_id(0) * logits.shape[1]

    @pl.when(tile == 0)
    def _():
        _init_statistics(max_logit, sum_exp, sum_exp_logit)
        if k:
            _init_lists(left, *best)

    @pl.when(first < columns[0])
    def _():
        _multiply(logits, head, hidden, numbers[0], softcap, width)
        _mask_columns(logits, 0, columns[0] - first)
        if bins:
            seconds = _fold_into_bins(logits, *bins[:2])
            highest = bins[0][...].max(axis=0, keepdims=True)
        else:
            seconds, highest = None, _highest(logits)
        _accumulate(logits, highest, max_logit, sum_exp, sum_exp_logit)
        if k:
            _update_lists(logits, highest, first, seconds, bins, *best)

    @pl.when(tile == tiles - 1)
    def _():
        # A logit of -inf makes only t NaN.
        s = jnp.where(jnp.isnan(sum_exp_logit[0, :]), jnp.nan, sum_exp[0, :])
        sum_exp[0, :] = s
        entropy = jnp.log(s) - sum_exp_logit[0, :] / s
        weights[0, :] = weight(entropy, (factor[0, :], numbers[1]), vocabulary)


def picks(
    numbers: Ref,
    columns: Ref,
    hidden: Ref,
    head: Ref,
    wanted: Ref,
    max_logit: Ref,
    sum_exp: Ref,
    sum_exp_logit: Ref,
    found: Ref,
    logits: Ref,
    *,
    softcap: float | None,
    width: int,
) -> None:
    """Fold one tile into the statistics of its tokens, and read it at their wanted ids.

    Each lane has its own s and t, over its own columns; m is the same in all lanes. `numbers` is
    (scale), `columns` is how many exist.
    """
    tile = pl.program_id(1)
    first = tile * logits.shape[1]

    @pl.when(tile == 0)
    def _():
        _init_statistics(max_logit, sum_exp, sum_exp_logit)
        found[...] = jnp.full(found.shape, -jnp.inf, jnp.float32)

    @pl.when(first < columns[0])
    def _():
        _multiply(logits, hidden, head, numbers[0], softcap, width)
        _mask_columns(logits, 1, columns[0] - first)
        size = math.gcd(logits.shape[0], SLAB // 2)

        def slab(index, _):
            at = pl.Slice(pl.multiple_of(index * size, size), size)
            _pick(logits, at, wanted[at, :] - first, max_logit, sum_exp, sum_exp_logit, found)
            return 0

        lax.fori_loop(0, logits.shape[0] // size, slab, 0)


def _init_statistics(max_logit: Ref, sum_exp: Ref, sum_exp_logit: Ref) -> None:
    max_logit[...] = jnp.full(max_logit.shape, LOWEST, jnp.float32)
    sum_exp[...] = jnp.zeros(sum_exp.shape, jnp.float32)
    sum_exp_logit[...] = jnp.zeros(sum_exp_logit.shape, jnp.float32)


def _multiply(
    logits: Ref, left: Ref, right: Ref, scale: Array, softcap: float | None, width: int
) -> None:
    """Set logits = scale * cap(left @ right.T), one slice of the width at a time."""
    slices = left.shape[1] // width

    def step(index, _):
        at = pl.ds(pl.multiple_of(index * width, width), width)
        x = dot(left[:, at], right[:, at], (1, 1))
        x = x + jnp.where(index > 0, logits[...], 0.0)
        # Scaling here saves one store of the logits, and is free during the product.
        logits[...] = x if softcap else x * jnp.where(index == slices - 1, scale, 1.0)
        return 0

    lax.fori_loop(0, slices, step, 0)
    if softcap:
        logits[...] = softcap * jnp.tanh(logits[...] / softcap) * scale


def _mask_columns(logits: Ref, axis: int, left: Array) -> None:
    """Set columns from `left` on to `LOWEST`: padding, or memory beyond the end of the head."""

    @pl.when(left < logits.shape[axis])
    def _():
        at = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
        logits[...] = jnp.where(at < left, logits[...], LOWEST)


def _accumulate(
    logits: Ref, highest: Array, max_logit: Ref, sum_exp: Ref, sum_exp_logit: Ref
) -> None:
    """Fold a tile and its highest logits into m, s, t."""
    before, now = max_logit[...], jnp.maximum(max_logit[...], highest)
    s = jnp.zeros((SUBLANES, logits.shape[1]), jnp.float32)
    t = jnp.zeros((SUBLANES, logits.shape[1]), jnp.float32)
    for at in _slabs(logits.shape[0], SLAB):
        u = logits[at, :] - now
        p = jnp.exp(u)
        s += _fold(p).sum(axis=0)
        t += _fold(p * u).sum(axis=0)
    gap = before - now
    decay = jnp.exp(gap)
    sum_exp_logit[...] = decay * (sum_exp_logit[...] + gap * sum_exp[...]) + t.sum(
        axis=0, keepdims=True
    )
    sum_exp[...] = decay * sum_exp[...] + s.sum(axis=0, keepdims=True)
    max_logit[...] = now


def _highest(logits: Ref) -> Array:
    highest = jnp.full((SUBLANES, logits.shape[1]), LOWEST, jnp.float32)
    for at in _slabs(logits.shape[0], SLAB):
        highest = jnp.maximum(highest, _fold(logits[at, :]).max(axis=0))
    return highest.max(axis=0, keepdims=True)


def _slabs(rows: int, most: int) -> list[pl.Slice]:
    size = math.gcd(rows, most)
    return [pl.Slice(start, size) for start in range(0, rows, size)]


def _fold(x: Array) -> Array:
    """Return the rows grouped by register, so that reducing the groups is elementwise."""
    return x.reshape(-1, SUBLANES, x.shape[1])


def _init_lists(left: Array, values: Ref, ids: Ref) -> None:
    """Empty the lists.

    Those of lanes beyond the `left` tokens, which hold garbage, accept nothing.
    """
    lane = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    values[...] = jnp.where(lane < left, LOWEST, jnp.inf)
    # Entries are identified by value and id, so each empty one needs an id of its own.
    ids[...] = -1.0 - lax.broadcasted_iota(jnp.int32, ids.shape, 0).astype(jnp.float32)


def _update_lists(
    logits: Ref,
    highest: Array,
    first: Array,
    seconds: Array | None,
    bins: Sequence[Ref],
    values: Ref,
    ids: Ref,
) -> None:
    """Insert the logits of a tile, whose column 0 is `first`, into the top-K lists.

    With bins, the maximum of each bin is inserted. That is exact unless the second largest of some
    bin belongs in the list, too; then the lists are restored and the whole tile is used.
    """
    first = first.astype(jnp.float32)

    def use_whole_tile() -> None:
        row = lax.broadcasted_iota(jnp.int32, logits.shape, 0).astype(jnp.float32)
        _extract(logits, highest, row + first, values, ids)

    if seconds is None:
        use_whole_tile()
        return
    winners, rows, old_values, old_ids = bins

    @pl.when(jnp.any(highest > values[...].min(axis=0, keepdims=True)))
    def _():
        old_values[...] = values[...]
        old_ids[...] = ids[...]
        _extract(winners, highest, rows[...] + first, values, ids)
        last, place = _smallest(values[...], ids[...])
        # A second equal to the list's last entry precedes it only if that is of this tile, too.
        missed = (seconds > last) | ((seconds == last) & (place >= first))

        @pl.when(jnp.any(missed))
        def _():
            values[...] = old_values[...]
            ids[...] = old_ids[...]
            use_whole_tile()


def _fold_into_bins(logits: Ref, winners: Ref, rows: Ref) -> Array:
    """Set each bin's highest logit and its row; return the highest of the second logits [1, B].

    Row r is in bin r mod the number of bins. Of equals the first wins.
    """
    bins = winners.shape[0]
    seconds = jnp.full((SUBLANES, logits.shape[1]), LOWEST, jnp.float32)
    for at in _slabs(bins, SLAB // 4):
        winner = logits[at, :]
        start = jnp.zeros_like(winner)
        second = jnp.full_like(winner, LOWEST)
        for offset in range(bins, logits.shape[0], bins):
            x = logits[pl.ds(at.start + offset, at.size), :]
            second = jnp.maximum(second, jnp.minimum(winner, x))
            start = jnp.where(x > winner, float(offset), start)
            winner = jnp.maximum(winner, x)
        winners[at, :] = winner
        row = lax.broadcasted_iota(jnp.int32, winner.shape, 0) + at.start
        rows[at, :] = start + row.astype(jnp.float32)
        seconds = jnp.maximum(seconds, _fold(second).max(axis=0))
    return seconds.max(axis=0, keepdims=True)


def _extract(pool: Ref, highest: Array, columns: Array, values: Ref, ids: Ref) -> None:
    """Move the highest entry of the pool into the lists while it exceeds the minimum of any list.

    Equals leave the pool lowest column first and must exceed what is in the list: the order of
    `lax.top_k`. At most K steps: a list filled by K entries of one pool accepts none of the rest.
    NaN exceeds nothing.
    """

    def beats(carry):
        trips, highest = carry
        return (trips < values.shape[0]) & jnp.any(highest > values[...].min(axis=0, keepdims=True))

    def move(carry):
        trips, highest = carry
        z = pool[...]
        column = jnp.where(z == highest, columns, jnp.inf).min(axis=0, keepdims=True)
        z = jnp.where(columns == column, LOWEST, z)
        pool[...] = z
        last, place = _smallest(values[...], ids[...])
        here = (ids[...] == place) & (highest > last)
        values[...] = jnp.where(here, highest, values[...])
        ids[...] = jnp.where(here, column, ids[...])
        return trips + 1, z.max(axis=0, keepdims=True)

    lax.while_loop(beats, move, (jnp.int32(0), highest))


def _smallest(values: Array, ids: Array) -> tuple[Array, Array]:
    """Return value and id of each list's last entry: its minimum, of equals the highest id."""
    last = values.min(axis=0, keepdims=True)
    return last, jnp.where(values == last, ids, -jnp.inf).max(axis=0, keepdims=True)


def _pick(
    logits: Ref,
    at: pl.Slice,
    wanted: Array,
    max_logit: Ref,
    sum_exp: Ref,
    sum_exp_logit: Ref,
    found: Ref,
) -> None:
    """Fold some tokens of a tile; `wanted` are ids within the tile, or outside of it."""
    blocks = [logits[at, pl.ds(start, LANES)] for start in range(0, logits.shape[1], LANES)]
    highest = functools.reduce(jnp.maximum, blocks).max(axis=1, keepdims=True)
    before = max_logit[at, :]
    now = jnp.maximum(before, jnp.broadcast_to(highest, before.shape))
    gap = before - now
    decay = jnp.exp(gap)
    t = decay * (sum_exp_logit[at, :] + gap * sum_exp[at, :])
    s = decay * sum_exp[at, :]
    values = found[at, :]
    # Not `%`, whose lowering asks for the generation of the TPU.
    lane, block = wanted & (LANES - 1), wanted >> (LANES.bit_length() - 1)
    for index, z in enumerate(blocks):
        u = z - now
        p = jnp.exp(u)
        s += p
        t += p * u
        values = jnp.where(block == index, jnp.take_along_axis(z, lane, axis=1), values)
    max_logit[at, :] = now
    sum_exp[at, :] = s
    sum_exp_logit[at, :] = t
    found[at, :] = values
