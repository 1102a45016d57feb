"""Head statistics in one kernel for Hopper GPUs: products by TMA and WGMMA, logits in registers.

    grid (ranges of the vocabulary, blocks of 128 tokens), each three warpgroups:
      one   copies tiles of hidden and head to shared memory, ahead of the others
      two   multiply 64 tokens each, and fold [64, C] logits into their tokens' partials
    partials of the ranges -> `partials.merge` -> HeadPartials

No logit leaves the registers. Two neighbouring blocks of a cluster share their tiles of the head:
alone, a block would need more bandwidth than the L2 cache has.

The logits of `ids` and `support_ids` are computed separately, from their rows of the head. With one
range, as for many tokens, the kernel's last step computes the weights; with several ranges they are
computed from the merged partials.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops import pallas_gpu_tile as tile
from fireopd_jax.ops import partials
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.logits import HeadSettings, as_vd, exists
from fireopd_jax.ops.partials import HeadPartials
from fireopd_jax.types import Array

COMPUTING = 2
"""Number of warpgroups that multiply; one more copies."""
TOKENS = COMPUTING * tile.ROWS
DEPTH = 64
"""Elements of the width per tile: 128 bytes, the widest swizzle of shared memory."""
STAGES = 4
"""Number of tiles of operands in shared memory at a time."""
COPYING_REGISTERS = 40
"""Registers per copying thread; the others get 232, of which 128 hold logits."""
GATHERED = 2**25
"""Elements of gathered head rows at a time, for the logits at given ids."""


def default_blocks(tokens: int, width: int, vocabulary: int, k: int, dtype: DTypeLike) -> Blocks:
    """Return 128 tokens by 256 columns by 64 elements, and 128 columns for K above 64.

    4 stages of (128 + 256) * 64 * 2 bytes are 192 KiB of the 227 KiB of shared memory. A list of
    more than 64 entries does not fit into the registers beside 256 columns.
    """
    return Blocks(tokens=TOKENS, vocabulary=256 if k <= 64 else 128, width=DEPTH)


def unsupported_reason(
    tokens: int, width: int, vocabulary: int, support: int, k: int, dtype: DTypeLike
) -> str | None:
    """Return why the kernel does not support this shape, or None if it does."""
    if not width or width % DEPTH:
        return f"width must be a multiple of {DEPTH}, got {width}"
    return tile.unsupported_reason(k, dtype, (jnp.bfloat16, jnp.float16))


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
    """Return the merged partials of the kernel's ranges; see `partials.Forward`."""
    head = as_vd(head, settings)
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    hidden, head = hidden.astype(dtype), head.astype(dtype)
    given = jnp.concatenate([ids[:, None], support_ids], axis=1)
    known = exists(given, settings.vocabulary if limit is None else limit)
    given = jnp.where(known, _logits_at(hidden, head, given, scale, settings), -jnp.inf)
    # The layout of shared memory needs a multiple of 8 rows.
    head = tile.pad(head, 8)
    found, weight = _run(tile.pad(hidden, TOKENS), head, scale, limit, settings, weight_inputs)
    merged = tile.assemble(found, given, settings)
    if weight is None:
        return partials.with_weight(merged, weight_inputs, settings.vocabulary)
    return dataclasses.replace(merged, weight=weight[: ids.shape[0]])


def _logits_at(
    hidden: Array, head: Array, ids: Array, scale: Array, settings: HeadSettings
) -> Array:
    """Return the logits at ids [N, S], some tokens at a time: S head rows per token are large."""
    if not ids.size:
        return jnp.zeros(ids.shape, jnp.float32)

    def of_token(pair):
        hidden, ids = pair
        rows = head[jnp.clip(ids, 0, settings.vocabulary - 1)]
        return jnp.einsum("d,sd->s", hidden, rows, preferred_element_type=jnp.float32)

    some = max(1, GATHERED // (ids.shape[1] * head.shape[1]))
    # A power of two, because it divides most numbers of tokens.
    some = min(1 << (some.bit_length() - 1), ids.shape[0])
    return tile.scale_and_cap(
        lax.map(of_token, (hidden, ids), batch_size=some), scale, settings.softcap
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static arguments of one launch."""

    settings: HeadSettings
    columns: int
    """Columns of a tile."""
    depth: int
    """Elements of the width per product."""
    ranges: int
    pair: bool
    """Whether blocks of tokens are in clusters of two."""
    end: int | None
    """Number of existing columns if the last tile is not full, else None."""
    computes_weight: bool
    """Whether the last step computes the weights, which needs one range."""

    @property
    def tiles(self) -> int:
        return -(-self.settings.vocabulary // self.columns)


def _plan(hidden: Array, settings: HeadSettings, computes_weight: bool) -> _Plan:
    tokens, width = hidden.shape
    vocabulary = settings.vocabulary
    default = default_blocks(tokens, width, vocabulary, settings.k, hidden.dtype)
    blocks = tile.resolve_blocks(settings, default)
    assert blocks.vocabulary is not None and blocks.width is not None
    ranges = tile.num_ranges(tokens // TOKENS, -(-vocabulary // blocks.vocabulary))
    return _Plan(
        settings=settings,
        columns=blocks.vocabulary,
        depth=blocks.width,
        ranges=ranges,
        pair=tokens // TOKENS % 2 == 0,
        end=vocabulary if vocabulary % blocks.vocabulary else None,
        computes_weight=computes_weight and ranges == 1,
    )


def _run(
    hidden: Array,
    head: Array,
    scale: Array,
    limit: Array | None,
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None,
) -> tuple[tuple[Array, ...], Array | None]:
    """Return each range's partials, in the form of `tile.empty`; with one range also weights."""
    gpu = tile.plgpu()
    tokens = hidden.shape[0]
    plan = _plan(hidden, settings, weight_inputs is not None)
    start = tile.empty(plan.ranges, tokens, settings.k)
    bound = None if limit is None else jnp.reshape(limit, 1)
    padded_inputs = weight = None
    if weight_inputs is not None and plan.computes_weight:
        padded_inputs = tile.pad(weight_inputs[0], TOKENS), jnp.reshape(weight_inputs[1], 1)
        weight = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    cluster = {"cluster": (2,), "cluster_names": ("pair",)} if plan.pair else {}
    return gpu.kernel(
        functools.partial(_kernel, plan),
        out_type=(tile.shapes(start), weight),
        grid=(plan.ranges, tokens // TOKENS // (2 if plan.pair else 1)),
        grid_names=("range", "block"),
        num_threads=COMPUTING + 1,
        thread_name="group",
        scratch_types=[gpu.SMEM((COMPUTING, tile.RUNNING, tile.ROWS), jnp.float32)],
        kernel_name="head_statistics",
        **cluster,
        **tile.launch(settings),
    )(hidden, head, start, jnp.reshape(scale, 1), bound, padded_inputs)


def _kernel(
    plan: _Plan,
    hidden: Any,
    head: Any,
    start: Any,
    scale: Any,
    bound: Any,
    weight_refs: Any,
    found: Any,
    weight: Any,
    running: Any,
) -> None:
    """Compute one block of tokens over one range of the vocabulary."""
    from jax.experimental import pallas as pl

    group = lax.axis_index("group")
    running = running.at[group]
    block = lax.axis_index("block")
    if plan.pair:
        block = 2 * block + lax.axis_index("pair")
    mine = pl.ds(block * TOKENS + group * tile.ROWS, tile.ROWS)
    at = lax.axis_index("range"), mine
    lists = [each.at[at] for each in found[3:]]
    end = plan.end if bound is None else bound[0]

    def fold(products, first):
        tile.fold(products, first, end, scale[0], running, lists, plan.settings)

    @pl.when(group < COMPUTING)
    def begin():
        tile.copy_in([each.at[at] for each in start], running, lists)

    _multiply(plan, hidden.at[pl.ds(block * TOKENS, TOKENS)], head, fold)

    @pl.when(group < COMPUTING)
    def finish():
        _, s, t = tile.copy_out(running, [each.at[at] for each in found[:3]])
        if weight_refs is not None:
            factor, alpha = weight_refs
            inputs = tile.load_row(factor.at[mine]), alpha[0]
            entropy = jnp.log(s) - t / s
            weight[mine] = partials.weight(entropy, inputs, plan.settings.vocabulary)


def _multiply(plan: _Plan, hidden: Any, head: Any, fold: Any) -> None:
    """Call `fold` with the products and the first column of each tile of this range, in order."""
    from jax.experimental import pallas as pl

    gpu = tile.plgpu()
    group = lax.axis_index("group")
    share = -(-plan.tiles // plan.ranges)
    before = lax.axis_index("range") * share

    def accumulate(_, hidden, head, products):
        rows = hidden.at[pl.ds(group * tile.ROWS, tile.ROWS)]
        gpu.wgmma(products, rows, head.transpose((1, 0)))
        gpu.wgmma_wait(0)
        return products

    def around(first):
        def compute(accumulated):
            def scope(products):
                accumulated(products)
                fold(products[...], first)

            pl.run_scoped(scope, gpu.ACC((tile.ROWS, plan.columns), jnp.float32))

        return compute

    def scope(buffers):
        def step(index, _):
            first = index * plan.columns
            pipeline = _pipeline(plan, hidden, accumulate, around(first))
            pipeline(hidden, head.at[pl.ds(first, plan.columns)], allocations=buffers)

        lax.fori_loop(before, jnp.minimum(before + share, plan.tiles), step, None)

    # Allocated once, not per tile: the copies of the next tile overlap the folding of this one.
    pipeline = _pipeline(plan, hidden, accumulate, around(0))
    buffers = pipeline.get_allocations(hidden, head)
    pl.run_scoped(scope, buffers, collective_axes="group")


def _pipeline(plan: _Plan, hidden: Any, body: Any, compute: Any) -> Any:
    """Return the pipeline that copies blocks along the width ahead of `body`, inside `compute`."""
    gpu = tile.plgpu()
    transforms = tile.swizzled(plan.depth, hidden.dtype)

    def block(rows, **options):
        shape = rows, plan.depth
        return gpu.BlockSpec(shape, lambda at: (0, at), transforms=transforms, **options)

    shared = {"collective_axes": ("pair",)} if plan.pair else {}
    return gpu.emit_pipeline_warp_specialized(
        body,
        grid=(hidden.shape[1] // plan.depth,),
        in_specs=[block(TOKENS), block(plan.columns, **shared)],
        max_concurrent_steps=STAGES,
        memory_registers=COPYING_REGISTERS,
        wg_axis="group",
        num_compute_wgs=COMPUTING,
        compute_context=compute,
    )
