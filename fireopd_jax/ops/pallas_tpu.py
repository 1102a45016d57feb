"""Head statistics in fused Pallas TPU kernels: logits stay in VMEM.

    no support  the kernel `statistics`: m, s, t, weight and the top-K list;
                the ids' logits are products of their own
    a support   the kernel `picks`: m, s, t, and the logits at ids and support from each tile

Blocks of tokens are large, because each reads the whole head once: 1024 tokens are 1024 operations
per byte in bfloat16, more than any TPU needs to be compute-bound.

Compiled for v5e, v5p and v6e, and run in JAX's interpreter, never on a TPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops import pallas_tpu_tile as tile
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.logits import HeadSettings, as_vd, exists
from fireopd_jax.ops.partials import HeadPartials, best_of, with_weight
from fireopd_jax.types import Array

DTYPES = ("bfloat16", "float32")
LARGEST_SUPPORT = tile.LANES - 1
"""The sampled id takes one of the 128 lanes."""
LARGEST_VOCABULARY = 2**24
"""The kernel's ids are float32, exact up to 2^24."""
SIZES = ((1024, 512), (512, 512), (256, 512), (256, 256), (128, 128))
"""Tokens and columns of a block, in order of preference."""
WIDEST_SLICE = 1024
"""Largest number of width elements per product."""
MEMORY = 44 * 2**20
"""Bytes of VMEM for the blocks: a core of v5p has 64 MiB, those of v5e and v6e 128 MiB."""
SPARE = 16 * 2**20
"""Bytes of VMEM beside the blocks, which the compiler uses to split float32 into bfloat16."""


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
    """Return the partials; see `partials.Forward`.

    A NaN or infinity of either sign among a token's logits makes all its statistics NaN.
    """
    head = as_vd(head, settings)
    columns = jnp.asarray(settings.vocabulary if limit is None else limit, jnp.int32)
    if support_ids.shape[1] == 0:
        return _statistics(hidden, head, ids, scale, columns, settings, weight_inputs)
    partials = _picks(hidden, head, ids, support_ids, scale, columns, settings)
    if settings.k:
        best = _statistics(hidden, head, ids, scale, columns, settings, None)
        best = {"top_logits": best.top_logits, "top_ids": best.top_ids}
        partials = dataclasses.replace(partials, **best)
    return with_weight(partials, weight_inputs, settings.vocabulary)


def unsupported_reason(
    tokens: int, width: int, vocabulary: int, support: int, k: int, dtype: DTypeLike
) -> str | None:
    """Return why the kernels do not support this shape, or None if they do."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"hidden and head must be {' or '.join(DTYPES)}, got {name}"
    if support > LARGEST_SUPPORT:
        return f"support_ids must be at most {LARGEST_SUPPORT} a token, got {support}"
    if vocabulary > LARGEST_VOCABULARY:
        return f"the vocabulary must be at most {LARGEST_VOCABULARY}, got {vocabulary}"
    if _sizes(tokens, width, vocabulary, dtype).memory(width, dtype) > MEMORY:
        return f"width {width} in {name} is too wide for blocks of {MEMORY >> 20} MiB"
    return None


def default_blocks(tokens: int, width: int, vocabulary: int, k: int, dtype: DTypeLike) -> Blocks:
    """Return 1024 tokens by 512 columns, or the first of `SIZES` that fits into `MEMORY`.

    Tokens are divided evenly, in multiples of 128: 1100 make two blocks of 640. The width is
    multiplied in slices of its largest divisor that is a multiple of 128 and at most
    `WIDEST_SLICE`, or as a whole if there is none.
    """
    return Blocks(*_sizes(tokens, width, vocabulary, dtype))


class _Sizes(NamedTuple):
    tokens: int
    vocabulary: int
    width: int

    def memory(self, width: int, dtype: DTypeLike) -> int:
        """Return the bytes of VMEM that the blocks need.

        The hidden states once and two tiles of the head, one of them being copied; per token its
        logits, its bins, and ten rows of 128 for the rest.
        """
        operands = (self.tokens + 2 * self.vocabulary) * width * jnp.dtype(dtype).itemsize
        return operands + 4 * self.tokens * (3 * self.vocabulary // 2 + 10 * tile.LANES)


def _sizes(tokens: int, width: int, vocabulary: int, dtype: DTypeLike) -> _Sizes:
    slices = [size for size in range(tile.LANES, WIDEST_SLICE + 1, tile.LANES) if width % size == 0]
    tokens = max(tokens, 1)
    for most, columns in SIZES:
        even = pl.cdiv(tokens, pl.cdiv(tokens, most))
        columns = min(columns, _whole_lanes(vocabulary))
        sizes = _Sizes(_whole_lanes(even), columns, max(slices, default=width))
        if sizes.memory(width, dtype) <= MEMORY:
            break
    return sizes


def _whole_lanes(size: int) -> int:
    return pl.cdiv(size, tile.LANES) * tile.LANES


def _resolve_blocks(hidden: Array, head: Array, settings: HeadSettings) -> _Sizes:
    """Return the default sizes, replaced by those that the settings name.

    Raises ValueError for sizes that the kernel does not support.
    """
    width = hidden.shape[1]
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    sizes = _sizes(hidden.shape[0], width, settings.vocabulary, dtype)
    if settings.blocks:
        named = {name: size for name, size in vars(settings.blocks).items() if size is not None}
        sizes = sizes._replace(**named)
    for name, size in (("tokens", sizes.tokens), ("vocabulary", sizes.vocabulary)):
        if size < 1 or size % tile.LANES:
            raise ValueError(f"blocks.{name} must be a multiple of {tile.LANES}, got {size}")
    if sizes.width != width and (sizes.width % tile.LANES or width % sizes.width):
        raise ValueError(
            f"blocks.width must be a multiple of {tile.LANES} that divides the width {width}, or "
            f"that width, got {sizes.width}"
        )
    return sizes


def _statistics(
    hidden: Array,
    head: Array,
    ids: Array,
    scale: Array,
    columns: Array,
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None,
) -> HeadPartials:
    """Return the partials, without a support, from the kernel `statistics`."""
    blocks, k = _resolve_blocks(hidden, head, settings), settings.k
    tokens, lanes = hidden.shape[0], max(hidden.shape[0], blocks.tokens)
    factor, alpha = weight_inputs or (jnp.zeros(tokens, jnp.float32), 0.0)
    scratch = [(blocks.vocabulary, blocks.tokens)]
    if 0 < k <= tile.BINNED_K:
        bins = blocks.vocabulary // tile.FOLD
        scratch += [(size, blocks.tokens) for size in (bins, bins, k, k)]
    outputs = _sweep(
        functools.partial(
            tile.statistics,
            tokens=tokens,
            vocabulary=settings.vocabulary,
            softcap=settings.softcap,
            width=blocks.width,
            k=k,
        ),
        jnp.stack([scale, jnp.asarray(alpha, jnp.float32)]),
        columns,
        hidden,
        head,
        _pad_to(lanes, factor)[None],
        [(1, lanes)] * 4 + [(k, lanes)] * 2 * (k > 0),
        lambda shape: pl.BlockSpec((shape[0], blocks.tokens), lambda i, v: (0, i)),
        scratch,
        blocks,
        settings,
    )
    max_logit, sum_exp, sum_exp_logit, weight, *best = (each[:, :tokens] for each in outputs)
    values, found = best or jnp.zeros((2, 0, tokens), jnp.float32)
    values = jnp.where(found < 0, -jnp.inf, values).T
    values, found = best_of(values, jnp.maximum(found, -1.0).T.astype(jnp.int32), k)
    # Summed in another order than in the kernel: rounding must not lift it above the maximum.
    id_logit = jnp.minimum(_logit_at(ids, hidden, head, scale, columns, settings), max_logit[0])
    no_support = jnp.zeros((tokens, 0), jnp.float32)
    weight = weight[0] if weight_inputs else None
    return HeadPartials(
        max_logit[0], sum_exp[0], sum_exp_logit[0], id_logit, no_support, values, found, weight
    )


def _logit_at(
    ids: Array, hidden: Array, head: Array, scale: Array, columns: Array, settings: HeadSettings
) -> Float32[Array, " N"]:
    rows = head[jnp.clip(ids, 0, settings.vocabulary - 1)]
    x = jnp.einsum(
        "nd,nd->n",
        hidden,
        rows,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if settings.softcap is not None:
        x = settings.softcap * jnp.tanh(x / settings.softcap)
    return jnp.where(exists(ids, columns), x * scale, -jnp.inf)


def _picks(
    hidden: Array,
    head: Array,
    ids: Array,
    support_ids: Array,
    scale: Array,
    columns: Array,
    settings: HeadSettings,
) -> HeadPartials:
    """Return the partials with a support, without a top-K, from the kernel `picks`."""
    blocks = _resolve_blocks(hidden, head, settings)
    (tokens, support), rows = support_ids.shape, max(hidden.shape[0], blocks.tokens)
    wanted = jnp.concatenate([support_ids, ids[:, None]], axis=1)
    rest = ((0, rows - tokens), (0, tile.LANES - support - 1))
    wanted = jnp.pad(jnp.where(exists(wanted, columns), wanted, -1), rest, constant_values=-1)
    outputs = _sweep(
        functools.partial(tile.picks, softcap=settings.softcap, width=blocks.width),
        scale[None],
        columns,
        hidden,
        head,
        wanted,
        [wanted.shape] * 4,
        lambda shape: pl.BlockSpec((blocks.tokens, shape[1]), lambda i, v: (i, 0)),
        [(blocks.tokens, blocks.vocabulary)],
        blocks,
        settings,
    )
    max_logit, sum_exp, sum_exp_logit, found = (each[:tokens] for each in outputs)
    sum_exp, sum_exp_logit = sum_exp.sum(axis=1), sum_exp_logit.sum(axis=1)
    return HeadPartials(
        max_logit=max_logit[:, 0],
        sum_exp=jnp.where(jnp.isnan(sum_exp_logit), jnp.nan, sum_exp),
        sum_exp_logit=sum_exp_logit,
        id_logit=found[:, support],
        support_logits=found[:, :support],
        top_logits=jnp.zeros((tokens, 0), jnp.float32),
        top_ids=jnp.zeros((tokens, 0), jnp.int32),
    )


def _sweep(
    kernel: functools.partial[None],
    numbers: Array,
    columns: Array,
    hidden: Array,
    head: Array,
    of_tokens: Array,
    shapes: list[tuple[int, ...]],
    spec: Callable[[tuple[int, ...]], pl.BlockSpec],
    scratch: list[tuple[int, int]],
    blocks: _Sizes,
    settings: HeadSettings,
) -> Sequence[Array]:
    """Run a kernel on every block of tokens and, in order, every tile of the vocabulary.

    `spec` returns the block spec of an input or output of the given shape, by block of tokens.
    """
    width = hidden.shape[1]
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    hidden, head = _pad_to(blocks.tokens, hidden), _pad_to(blocks.vocabulary, head)
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    # The hidden states change once per sweep, so one buffer is enough.
    resident = pl.BlockSpec(
        (blocks.tokens, width), lambda i, v: (i, 0), pipeline_mode=pl.Buffered(1)
    )
    rows = pl.BlockSpec((blocks.vocabulary, width), lambda i, v: (v, 0))
    return pl.pallas_call(
        kernel,
        grid=(
            pl.cdiv(hidden.shape[0], blocks.tokens),
            pl.cdiv(settings.vocabulary, blocks.vocabulary),
        ),
        in_specs=[scalars, scalars, resident, rows, spec(of_tokens.shape)],
        out_specs=[spec(shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=blocks.memory(width, dtype) + SPARE,
        ),
        interpret=settings.interpret,
        name=f"fireopd_head_{kernel.func.__name__}",
    )(numbers, columns[None], hidden, head, of_tokens)


def _pad_to(rows: int, x: Array) -> Array:
    """Return `x` padded to at least one block of rows.

    A later block may end beyond the array; the kernel masks it.
    """
    return jnp.pad(x, ((0, max(rows - x.shape[0], 0)), *((0, 0),) * (x.ndim - 1)))
