"""Operations of both GPU kernels on a tile of logits: fold it into statistics and a running top-K.

    products [64, C] in registers of one warpgroup
      -> scaled, capped, masked -> running (m, s, t, threshold) [64] in shared memory
      -> entries above a row's threshold, largest first -> its list [L] in global memory, unsorted

A list changes only where a tile has an entry above the list's minimum, which is rare after the
first tiles. So the lists are in global memory (in effect in the L2 cache), and shared memory is
left to the operands. They are sorted outside, in `partials.merge`.

Only what Mosaic GPU lowers is used: reductions over one axis, `where`, compares, `exp`, `log`, and
`while` on a scalar. Mosaic GPU is imported when a kernel is built, because older JAX has none that
works.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.logits import HeadSettings
from fireopd_jax.ops.partials import LOWEST, HeadPartials, merge
from fireopd_jax.types import Array

OLDEST_JAX = (0, 11)
LARGEST_K = 128
ROWS = 64
"""Tokens of a warpgroup: the rows of one WGMMA instruction."""
SLICE = 64
"""Columns per pass of the top-K: a whole tile does not fit into the registers beside the list."""
SLOTS = 8
"""The list length is a multiple of it, as the register layout requires."""
PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200; elsewhere the choice of ranges is slower, not
wrong.
"""
MASKED = -3e38
"""Logit of a missing column: far below `LOWEST`, yet finite, so that p u is 0 where p is."""

MAX_LOGIT, SUM_EXP, SUM_EXP_LOGIT, THRESHOLD, FLAG = range(5)
RUNNING = 5
"""Rows of a warpgroup's scratch in shared memory, float32[64] each."""


def plgpu() -> Any:
    """Return the module of Mosaic GPU."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def unsupported_reason(k: int, dtype: DTypeLike, dtypes: Sequence[DTypeLike]) -> str | None:
    """Return why a GPU kernel of these `dtypes` does not support the arguments, or None."""
    if jax.__version_info__ < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        return f"Mosaic GPU kernels need JAX {oldest} or newer, this is {jax.__version__}"
    if k > LARGEST_K:
        return f"k must be at most {LARGEST_K}, got {k}"
    names = [jnp.dtype(each).name for each in dtypes]
    if jnp.dtype(dtype).name not in names:
        return f"hidden and head must be {' or '.join(names)}, got {jnp.dtype(dtype).name}"
    return None


def resolve_blocks(settings: HeadSettings, default: Blocks) -> Blocks:
    """Return `default` with the vocabulary block that the settings name.

    Raises ValueError for block sizes that the kernel does not support.
    """
    asked = settings.blocks or Blocks()
    for name in ("tokens", "width"):
        if getattr(asked, name) not in (None, getattr(default, name)):
            raise ValueError(
                f"blocks.{name} must be {getattr(default, name)} here, got {getattr(asked, name)}"
            )
    columns = asked.vocabulary or default.vocabulary
    assert columns is not None
    if columns % SLICE or not 0 < columns <= 256:
        raise ValueError(f"blocks.vocabulary must be 64, 128, 192 or 256, got {columns}")
    return dataclasses.replace(default, vocabulary=columns)


def num_ranges(blocks: int, tiles: int) -> int:
    """Return the number of vocabulary ranges that minimises the estimated time.

    Blocks times ranges run in rounds over the processors; each costs its share of the tiles and, to
    start and to fill its lists, as much as about 8 more tiles. Several ranges help with few blocks
    of tokens.
    """

    def time(count: int) -> int:
        return -(-blocks * count // PROCESSORS) * (-(-tiles // count) + 8)

    return min(range(1, min(tiles, PROCESSORS) + 1), key=time)


def pad(x: Array, rows: int) -> Array:
    """Return `x` with rows of zeros appended up to a multiple of `rows`, at least one multiple."""
    lacking = max(1, -(-x.shape[0] // rows)) * rows - x.shape[0]
    return jnp.pad(x, ((0, lacking), *[(0, 0)] * (x.ndim - 1)))


def empty(count: int, tokens: int, k: int) -> tuple[Array, ...]:
    """Return the initial m, s, t of each range, and with a top-K the values and ids of the lists.

    Slots beyond K hold infinity, which nothing replaces. Ids of empty slots are distinct and differ
    from column ids, so that exactly one slot is the minimum.
    """
    zero = jnp.zeros((count, tokens), jnp.float32)
    if not k:
        return zero + LOWEST, zero, zero
    slot = lax.broadcasted_iota(jnp.int32, (count, tokens, -(-k // SLOTS) * SLOTS), 2)
    return zero + LOWEST, zero, zero, jnp.where(slot < k, MASKED, jnp.inf), -1 - slot


def assemble(found: Sequence[Array], given: Array, settings: HeadSettings) -> HeadPartials:
    """Return the merged partials of the ranges, for the tokens of `given` [N, 1 + S].

    `given` are the logits of a token's id and of its support. They are summed in another order than
    the kernel's and may exceed the maximum by rounding, so they are clipped to it.
    """

    def of_range(max_logit, sum_exp, sum_exp_logit, *lists):
        shape = max_logit.shape[0], 0
        values, ids = lists or (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))
        values, ids = values[:, : settings.k], ids[:, : settings.k]
        known = values > MASKED
        values, ids = jnp.where(known, values, -jnp.inf), jnp.where(known, ids, -1)
        return HeadPartials(
            max_logit, sum_exp, sum_exp_logit, max_logit, values[:, :0], values, ids
        )

    merged = merge(jax.vmap(of_range)(*found), settings.k)
    merged = jax.tree.map(lambda each: each[: given.shape[0]], merged)
    given = jnp.minimum(given, merged.max_logit[:, None])
    return dataclasses.replace(merged, id_logit=given[:, 0], support_logits=given[:, 1:])


def scale_and_cap(x: Array, scale: Array, softcap: float | None) -> Array:
    """Return z = scale * c tanh(x / c), or scale * x without a soft cap c."""
    if softcap is None:
        return x * scale
    # The hardware's tanh has an error of 2^-11. Where exp overflows or underflows, this is 1 or -1.
    return (1.0 - 2.0 / (jnp.exp(x * (2.0 / softcap)) + 1.0)) * (softcap * scale)


def launch(settings: HeadSettings) -> dict[str, Any]:
    """Return the launch options of all kernels: fast exp and log, with errors below 2^-21."""
    gpu = plgpu()
    return {
        "compiler_params": gpu.CompilerParams(approx_math=True),
        "interpret": gpu.InterpretGPUParams() if settings.interpret else None,
    }


def shapes(arrays: Sequence[Array]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shapes and dtypes of the arrays."""
    return tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays)


def swizzled(width: int, dtype: DTypeLike) -> tuple[Any, Any]:
    """Return the layout of shared memory that TMA writes and WGMMA reads without bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu().find_swizzle(width * size * 8)
    return plgpu().TilingTransform((8, swizzle // size)), plgpu().SwizzleTransform(swizzle)


def load_row(ref: Any) -> Array:
    """Return one value per token from memory, in the layout of a tile's row reduction."""
    gpu = plgpu()
    return gpu.load(ref, layout=gpu.Layout.WGMMA.reduce(1), optimized=False)


def load_tile(ref: Any) -> Array:
    """Return several values per token from memory, in the layout of a tile."""
    gpu = plgpu()
    return gpu.load(ref, layout=gpu.Layout.WGMMA, optimized=False)


def copy_in(start: Sequence[Any], running: Any, lists: Sequence[Any]) -> None:
    """Copy the partials of a block of tokens to shared memory (m, s, t) and the output lists."""
    for name, source in zip((MAX_LOGIT, SUM_EXP, SUM_EXP_LOGIT), start[:3], strict=True):
        running[name] = load_row(source)
    if lists:
        values, ids = (load_tile(source) for source in start[3:])
        lists[0][...], lists[1][...] = values, ids
        running[THRESHOLD] = jnp.min(values, axis=1)


def copy_out(running: Any, results: Sequence[Any]) -> list[Array]:
    """Write m, s, t to `results` and return them; the lists are in the output already."""
    values = [load_row(running.at[name]) for name in (MAX_LOGIT, SUM_EXP, SUM_EXP_LOGIT)]
    for value, result in zip(values, results, strict=True):
        result[...] = value
    return values


def fold(
    x: Array,
    first: Array | int,
    end: Array | int | None,
    scale: Array,
    running: Any,
    lists: Sequence[Any],
    settings: HeadSettings,
) -> None:
    """Fold the products `x` of the columns from `first` on into the partials of a block.

    Columns from `end` on do not exist; None: all do. `lists` are the values and ids of the block.
    """
    z = scale_and_cap(x, scale, settings.softcap)
    if end is not None:
        # Not `columns < end - first`: this order needs fewer registers.
        z = jnp.where(_column_index(z.shape) + first < end, z, MASKED)
    m, s, t = (load_row(running.at[name]) for name in (MAX_LOGIT, SUM_EXP, SUM_EXP_LOGIT))
    top = jnp.maximum(m, jnp.max(z, axis=1))
    u = z - _broadcast(top, z.shape)
    p = jnp.exp(u)
    d = m - top
    decay = jnp.exp(d)
    running[SUM_EXP_LOGIT] = decay * (t + d * s) + jnp.sum(p * u, axis=1)
    running[SUM_EXP] = decay * s + jnp.sum(p, axis=1)
    running[MAX_LOGIT] = top
    if lists:
        for at in range(0, z.shape[1], SLICE):
            _insert(z[:, at : at + SLICE], first + at, running, lists)


def _insert(z: Array, first: Array | int, running: Any, lists: Sequence[Any]) -> None:
    """Move entries above a row's minimum into its list: largest first, of equals the lowest column.

    Each pass takes one column of every row. After as many passes as there are slots or columns no
    entry can enter a list, so the bound on the passes only stops a loop that a NaN would keep
    going.
    """
    from jax.experimental import pallas as pl

    largest = jnp.max(z, axis=1)
    columns, length = z.shape[1], lists[0].shape[1]

    def take(carry):
        passes, _, z, largest, values, ids = carry
        column = jnp.min(
            jnp.where(z == _broadcast(largest, z.shape), _column_index(z.shape), columns), axis=1
        )
        worst = _broadcast(jnp.min(values, axis=1), values.shape)
        last = _broadcast(jnp.max(jnp.where(values == worst, ids, -(2**31)), axis=1), ids.shape)
        # Replace the minimum only if strictly larger: an equal in the list has a lower id.
        entry = jnp.where(ids == last, _broadcast(largest, values.shape), MASKED)
        better = entry > values
        ids = jnp.where(better, _broadcast(column + first, ids.shape), ids)
        values = jnp.where(better, entry, values)
        z = jnp.where(_column_index(z.shape) == _broadcast(column, z.shape), MASKED, z)
        largest = jnp.max(z, axis=1)
        more = _any(largest > jnp.min(values, axis=1), running)
        return passes + 1, more, z, largest, values, ids

    def unfinished(carry):
        passes, more, *_ = carry
        return more & (passes < min(columns, length))

    @pl.when(_any(largest > load_row(running.at[THRESHOLD]), running))
    def update():
        values, ids = (load_tile(each) for each in lists)
        start = (jnp.int32(0), jnp.bool_(True), z, largest, values, ids)
        *_, values, ids = lax.while_loop(unfinished, take, start)
        lists[0][...], lists[1][...] = values, ids
        running[THRESHOLD] = jnp.min(values, axis=1)


def _any(row: Array, running: Any) -> Array:
    """Return whether any token's flag is set, equal for all threads of the warpgroup.

    Reducing `row` itself would cross warps through scratch memory at an offset that Mosaic GPU
    shares between all warpgroups of a block: a race. Read back in this layout, every warp has the
    whole row, two tokens per thread, and nothing crosses warps.
    """
    gpu = plgpu()
    layout = gpu.Layout.TILED(
        gpu.Tiling(((ROWS,), (2,))), warp_dims=(gpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
    )
    running[FLAG] = jnp.where(row, 1.0, 0.0)
    return jnp.max(gpu.load(running.at[FLAG], layout=layout, optimized=False)) > 0.0


def _column_index(shape: tuple[int, ...]) -> Array:
    gpu = plgpu()
    return gpu.broadcasted_iota(jnp.int32, shape, 1, layout=gpu.Layout.WGMMA)


def _broadcast(row: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(row, shape, (0,))
