"""Which keys a query attends to, for single tokens and for blocks of them.

    key j, query i of a row:  j <= i,  segment_j = segment_i != 0,  position_i - position_j < window

Blocks are tested by the ranges of their segment ids and positions. That never excludes a block
that has an allowed pair; with ids that increase along a row it excludes all others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32

from fireopd_jax.types import Array, pytree

FAR = 2**30
"""Larger than any position."""


@pytree
class Layout:
    """Where the tokens of the rows belong: integers, without gradient."""

    segments: Int32[Array, "B T"]
    """Segment of each token; 0: padding."""
    positions: Int32[Array, "B T"] | None = None
    """Position of each token, which the window counts; None where there is no window."""
    window: Int32[Array, ""] | None = None
    """Keys that a query attends to, its own included; None: all before it."""


class Tokens(NamedTuple):
    """Index, segment and position of some tokens of each row."""

    index: Array
    segments: Array
    positions: Array | None


def tokens_of(layout: Layout, length: int) -> Tokens:
    """Return the tokens of the rows, padded to `length`."""
    more = ((0, 0), (0, length - layout.segments.shape[1]))
    positions = None if layout.positions is None else jnp.pad(layout.positions, more)
    index = jnp.arange(length, dtype=jnp.int32)
    return Tokens(index, jnp.pad(layout.segments, more), positions)


def block_of(tokens: Tokens, first: Array | int, size: int) -> Tokens:
    """Return the tokens from index `first` on."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size, leaf.ndim - 1), tokens
    )


def allowed(queries: Tokens, keys: Tokens, window: Int32[Array, ""] | None) -> Bool[Array, "B Q S"]:
    """Return which of the keys each query attends to."""
    mask = queries.segments[:, :, None] == keys.segments[:, None, :]
    mask &= (queries.segments > 0)[:, :, None]
    mask &= (queries.index[:, None] >= keys.index[None, :])[None]
    if window is not None and queries.positions is not None and keys.positions is not None:
        mask &= queries.positions[:, :, None] - keys.positions[:, None, :] < window
    return mask


def needed_blocks(
    layout: Layout, length: tuple[int, int], size: tuple[int, int]
) -> tuple[Int32[Array, " N"], Int32[Array, " N"]]:
    """Return the first key block that each query block needs in any row, and the end of them.

    `length` are the padded numbers of queries and keys, `size` those of a block. A query block of
    padding alone needs none.
    """
    queries, keys = (
        _Ranges(tokens_of(layout, total), block) for total, block in zip(length, size, strict=True)
    )
    # [B, query block, key block]
    need = keys.low[:, None, :] <= queries.high[:, :, None]
    need &= queries.low[:, :, None] <= keys.high[:, None, :]
    if layout.window is not None:
        need &= queries.nearest[:, :, None] - keys.farthest[:, None, :] < layout.window
    columns = jnp.arange(need.shape[2], dtype=jnp.int32)[None]
    last_query = (jnp.arange(need.shape[1], dtype=jnp.int32)[:, None] + 1) * size[0] - 1
    some = need.any(axis=0) & (columns * size[1] <= last_query)
    first = jnp.where(some, columns, need.shape[2]).min(axis=1)
    end = jnp.where(some, columns + 1, 0).max(axis=1)
    return first.astype(jnp.int32), end.astype(jnp.int32)


class _Ranges:
    """Smallest and largest segment id and position in each block of each row, [B, blocks]."""

    def __init__(self, tokens: Tokens, size: int):
        segments = tokens.segments.reshape(tokens.segments.shape[0], -1, size)
        real = segments > 0
        self.low = jnp.where(real, segments, jnp.iinfo(jnp.int32).max).min(axis=2)
        self.high = segments.max(axis=2)
        if tokens.positions is not None:
            positions = tokens.positions.reshape(segments.shape)
            self.nearest = jnp.where(real, positions, FAR).min(axis=2)
            self.farthest = jnp.where(real, positions, -FAR).max(axis=2)
