"""Head statistics on Hopper GPUs by chunks: XLA multiplies, a kernel reads each chunk once.

    rows of the head -> products [N, C], float32, by XLA's GEMM
      -> those at given ids
      -> kernel, grid (ranges of the columns, blocks of 64 tokens): updates the partials
    partials of the ranges -> `partials.merge` -> HeadPartials

`chunked` reads a chunk for its maxima, its sums and its top-K; this kernel reads it once. The
kernel also applies scale and soft cap, since a GEMM writes bare products. A range is the same share
of every chunk and has partials of its own. Weights are computed from the merged partials.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops import pallas_gpu_tile as tile
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.logits import HeadSettings, dot, exists, head_rows
from fireopd_jax.ops.partials import HeadPartials, with_weight
from fireopd_jax.types import Array

STAGES = 2
"""Number of tiles in shared memory at a time; a second block per processor hides the latency."""


def default_blocks(tokens: int, width: int, vocabulary: int, k: int, dtype: DTypeLike) -> Blocks:
    """Return 64 tokens by 128 columns: 64 registers per thread, 32 KiB of shared memory per stage.

    Then a processor can run two blocks of threads for every K.
    """
    return Blocks(tokens=tile.ROWS, vocabulary=128)


def unsupported_reason(
    tokens: int, width: int, vocabulary: int, support: int, k: int, dtype: DTypeLike
) -> str | None:
    """Return why the kernel does not support these arguments, or None if it does."""
    return tile.unsupported_reason(k, dtype, (jnp.bfloat16, jnp.float16, jnp.float32))


def forward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N S"],
    scale: Float32[Array, ""],
    limit: Int32[Array, ""] | None,
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None = None,
) -> HeadPartials:
    """Return the merged partials of all chunks; see `partials.Forward`."""
    tokens = ids.shape[0]
    vocabulary = settings.vocabulary
    default = default_blocks(tokens, hidden.shape[1], vocabulary, settings.k, hidden.dtype)
    columns = tile.resolve_blocks(settings, default).vocabulary
    assert columns is not None
    hidden = tile.pad(hidden, tile.ROWS)
    ids = tile.pad(jnp.concatenate([ids[:, None], support_ids], axis=1), tile.ROWS)
    width = min(settings.chunk, vocabulary)

    def step(carry, first, width):
        found, given = carry
        # Pad to whole tiles, whose rows TMA can read.
        rows = jnp.pad(head_rows(head, first, width, settings), ((0, -width % columns), (0, 0)))
        products = dot(hidden, rows, (1, 1))
        here = (ids >= first) & (ids < first + width)
        x = jnp.take_along_axis(products, jnp.clip(ids - first, 0, width - 1), axis=1)
        given = jnp.where(here, tile.scale_and_cap(x, scale, settings.softcap), given)
        end = None
        if limit is not None or width % columns:
            end = jnp.minimum(first + width, vocabulary if limit is None else limit)
        return _fold(products, first, end, scale, found, columns, settings), given

    blocks = hidden.shape[0] // tile.ROWS
    start = tile.empty(tile.num_ranges(blocks, -(-width // columns)), hidden.shape[0], settings.k)
    carry = start, jnp.full(ids.shape, -jnp.inf, jnp.float32)
    full, rest = divmod(vocabulary, width)
    carry, _ = lax.scan(
        lambda carry, index: (step(carry, index * width, width), None),
        carry,
        jnp.arange(full, dtype=jnp.int32),
    )
    found, given = step(carry, full * width, rest) if rest else carry
    if limit is not None:
        given = jnp.where(exists(ids, limit), given, -jnp.inf)
    merged = tile.assemble(found, given[:tokens], settings)
    return with_weight(merged, weight_inputs, vocabulary)


def _fold(
    products: Array,
    first: Array | int,
    end: Array | None,
    scale: Array,
    found: tuple[Array, ...],
    columns: int,
    settings: HeadSettings,
) -> tuple[Array, ...]:
    """Return `found` updated by the kernel with one chunk, whose first column is `first`."""
    gpu = tile.plgpu()
    bound = None if end is None else jnp.reshape(end, 1)
    first = jnp.reshape(jnp.asarray(first, jnp.int32), 1)
    (found,) = gpu.kernel(
        functools.partial(_kernel, columns, settings),
        out_type=(tile.shapes(found),),
        grid=(found[0].shape[0], products.shape[0] // tile.ROWS),
        grid_names=("range", "block"),
        scratch_types=[gpu.SMEM((tile.RUNNING, tile.ROWS), jnp.float32)],
        kernel_name="head_rows",
        **tile.launch(settings),
    )(products, found, first, bound, jnp.reshape(scale, 1))
    return found


def _kernel(
    columns: int,
    settings: HeadSettings,
    products: Any,
    start: Any,
    first: Any,
    bound: Any,
    scale: Any,
    found: Any,
    running: Any,
) -> None:
    """Fold one range of the chunk's columns into one block of tokens."""
    from jax.experimental import pallas as pl

    gpu = tile.plgpu()
    block = pl.ds(lax.axis_index("block") * tile.ROWS, tile.ROWS)
    at = lax.axis_index("range"), block
    end = None if bound is None else bound[0]
    lists = [each.at[at] for each in found[3:]]
    tile.copy_in([each.at[at] for each in start], running, lists)
    tiles = products.shape[1] // columns
    share = -(-tiles // lax.axis_size("range"))
    before = lax.axis_index("range") * share

    def step(index, x):
        column = first[0] + (before + index[0]) * columns
        x = gpu.load(x, layout=gpu.Layout.WGMMA)
        tile.fold(x, column, end, scale[0], running, lists, settings)

    tiled = tile.swizzled(columns, products.dtype)
    gpu.emit_pipeline(
        step,
        grid=(jnp.clip(tiles - before, 0, share),),
        in_specs=[gpu.BlockSpec((tile.ROWS, columns), lambda i: (0, before + i), transforms=tiled)],
        max_concurrent_steps=STAGES,
    )(products.at[block])
    tile.copy_out(running, [each.at[at] for each in found[:3]])
