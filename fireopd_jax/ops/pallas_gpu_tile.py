"""What both GPU kernels do with a tile of logits: fold it into statistics and a running top-K.

    products [64, C] in registers, one warpgroup's
      -> scaled, capped, masked -> running (m, s, t, threshold) [64] in shared memory
      -> what beats a row's threshold, the largest first -> its list [L] in global memory, unsorted

A list is touched only where a tile holds something above its smallest entry, which is rare after
the first tiles. So it lies in global memory, that is in the L2 cache, and leaves shared memory to
the operands. Sorting is left to `partials.merge`, outside.

Only what Mosaic GPU lowers is used: reductions over one axis, `where`, compares, `exp`, `log`, and
`while` on a scalar. Mosaic GPU is imported when a kernel is built: older JAX has none that serves.
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
"""Tokens of a warpgroup: as many as one WGMMA instruction multiplies."""
SLICE = 64
"""Columns that one pass of the top-K looks at: the whole tile would not fit beside the list."""
SLOTS = 8
"""The length of a list is a multiple of it, as the layout of registers wants."""
PROCESSORS = 132
"""Of an H100 or H200. Another number costs time, nothing else."""
MASKED = -3e38
"""A column that does not exist: far below `LOWEST`, yet finite, for p u must be 0 where p is."""

MAX_LOGIT, SUM_EXP, SUM_EXP_LOGIT, THRESHOLD, FLAG = range(5)
RUNNING = 5
"""Rows of a warpgroup's shared memory, float32[64] each."""


def plgpu() -> Any:
    """Import Mosaic GPU."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def unsupported_reason(k: int, dtype: DTypeLike, dtypes: Sequence[DTypeLike]) -> str | None:
    """Say what stands against either kernel."""
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
    """Replace `default` blocks by those asked for, where the kernel can have them."""
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
    """Choose into how many ranges to split the vocabulary, for the sake of few blocks of tokens.

    Blocks times ranges go round the processors. Each takes its share of the tiles, and as long as
    about 8 more to begin and to fill its lists.
    """

    def time(count: int) -> int:
        return -(-blocks * count // PROCESSORS) * (-(-tiles // count) + 8)

    return min(range(1, min(tiles, PROCESSORS) + 1), key=time)


def pad(x: Array, rows: int) -> Array:
    """Append rows of zeros until there are whole blocks of them, one at least."""
    lacking = max(1, -(-x.shape[0] // rows)) * rows - x.shape[0]
    return jnp.pad(x, ((0, lacking), *[(0, 0)] * (x.ndim - 1)))


def empty(count: int, tokens: int, k: int) -> tuple[Array, ...]:
    """Begin m, s and t of each range, and for a top-K the values and ids of the lists.

    Slots beyond K hold infinity, which nothing replaces. Ids of empty slots differ from all others,
    as ids of columns do: exactly one slot is the worst.
    """
    zero = jnp.zeros((count, tokens), jnp.float32)
    if not k:
        return zero + LOWEST, zero, zero
    slot = lax.broadcasted_iota(jnp.int32, (count, tokens, -(-k // SLOTS) * SLOTS), 2)
    return zero + LOWEST, zero, zero, jnp.where(slot < k, MASKED, jnp.inf), -1 - slot


def assemble(found: Sequence[Array], given: Array, settings: HeadSettings) -> HeadPartials:
    """Merge the states of the ranges; `given` are the logits of a token's id and of its support.

    Tokens beyond those of `given` are dropped. A logit that was summed in another order may exceed
    the maximum by its rounding: it is held to it.
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
    """Return z = scale * c tanh(x / c)."""
    if softcap is None:
        return x * scale
    # The hardware's tanh is off by 2^-11. Where exp overflows or vanishes, this is 1 or -1.
    return (1.0 - 2.0 / (jnp.exp(x * (2.0 / softcap)) + 1.0)) * (softcap * scale)


def launch(settings: HeadSettings) -> dict[str, Any]:
    """Give the options that all kernels are launched with: fast exp and log, errors below 2^-21."""
    gpu = plgpu()
    return {
        "compiler_params": gpu.CompilerParams(approx_math=True),
        "interpret": gpu.InterpretGPUParams() if settings.interpret else None,
    }


def shapes(arrays: Sequence[Array]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the types of results that are shaped like these."""
    return tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays)


def swizzled(width: int, dtype: DTypeLike) -> tuple[Any, Any]:
    """Lay out shared memory as TMA writes and WGMMA reads it, free of bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu().find_swizzle(width * size * 8)
    return plgpu().TilingTransform((8, swizzle // size)), plgpu().SwizzleTransform(swizzle)


def load_row(ref: Any) -> Array:
    """Load one value a token, laid out as a reduction of a tile is."""
    gpu = plgpu()
    return gpu.load(ref, layout=gpu.Layout.WGMMA.reduce(1), optimized=False)


def load_tile(ref: Any) -> Array:
    """Load several values a token, laid out as a tile is."""
    gpu = plgpu()
    return gpu.load(ref, layout=gpu.Layout.WGMMA, optimized=False)


def copy_in(start: Sequence[Any], running: Any, lists: Sequence[Any]) -> None:
    """Copy the state of a block of tokens to where it is worked on."""
    for name, source in zip((MAX_LOGIT, SUM_EXP, SUM_EXP_LOGIT), start[:3], strict=True):
        running[name] = load_row(source)
    if lists:
        values, ids = (load_tile(source) for source in start[3:])
        lists[0][...], lists[1][...] = values, ids
        running[THRESHOLD] = jnp.min(values, axis=1)


def copy_out(running: Any, results: Sequence[Any]) -> list[Array]:
    """Return m, s and t, and copy them out; the lists lie there already."""
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
    """Fold the products of the columns from `first` on into a block's state.

    Columns from `end` on do not exist; None: all do. `lists` are the block's values and ids.
    """
    z = scale_and_cap(x, scale, settings.softcap)
    if end is not None:
        # In this order, and not against end - first: it saves registers.
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
    """Move what beats a row's worst entry into its list: the largest first, of equals the lowest.

    Each pass takes one column of every row. After as many passes as there are slots or columns
    none is left that could beat a list, so the bound ends no loop early; it is there lest a NaN
    keeps one going.
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
        # Only the worst slot, and only if strictly larger: an equal in the list has a lower id.
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
    """Tell whether any token's flag is up, the same to all threads of the warpgroup.

    A reduction of `row` itself would cross the warps by way of scratch memory, and Mosaic GPU gives
    all warpgroups of a block the same: they would race. Read back in this layout, every warp has
    the whole row, two tokens a thread, and nothing crosses.
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
