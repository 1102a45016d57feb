"""Attention on a TPU by JAX's Pallas kernels (splash attention), forward and backward.

Their masks are static: causality and a window that is a Python integer and counts indices. Segments
are arrays. Compiled for v5e, v5p and v6e, and run in JAX's interpreter, never on a TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Float32

from fireopd_jax.ops.attention.masks import Layout
from fireopd_jax.ops.attention.settings import AttentionSettings
from fireopd_jax.ops.precision import precisely
from fireopd_jax.types import Array

LANES = 128
"""Blocks of tokens are multiples of this, and so are the head widths that need no padding."""
LARGEST_BLOCK = 512


def unsupported_reason(
    length: int, heads: int, key_heads: int, width: int, dtype: str, window: int | str | None
) -> str | None:
    """Return why the kernel does not support the operands, or None."""
    if isinstance(window, str):
        return f"{window} is not supported, its masks are static"
    if dtype not in ("bfloat16", "float32"):
        return f"dtype {dtype} is not supported, only bfloat16 and float32"
    if width > 256:
        return f"head width {width} is not supported, at most 256 is"
    return None


def forward(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Return the output in the dtype of v, and the log-sum-exp of each query's scores."""
    run = _kernel(settings, q.shape[1], q.shape[2], save_residuals=True)
    operands = _operands(settings, q, k, v)
    with precisely(q.dtype):
        out, (logsumexp,) = jax.vmap(run)(*operands, _segments(layout, operands[0].shape[2]))
    length, width = q.shape[1], q.shape[3]
    out = out[:, :, :length, :width].swapaxes(1, 2).astype(v.dtype)
    return out, logsumexp[:, :, :length]


def backward(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
    out: Float[Array, "B T N H"],
    logsumexp: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
    """Return d q, d k, d v in the dtypes of q, k, v.

    The kernel's own rule of differentiation would run the forward pass again; its backward pass is
    called with the output and log-sum-exp that exist.
    """
    made = _kernel(settings, q.shape[1], q.shape[2], save_residuals=False)
    qs, ks, vs = _operands(settings, q, k, v)
    total = qs.shape[2]
    ids = _segments(layout, total)
    outs, d_outs = (_padded(each.swapaxes(1, 2)) for each in (out, d_out))
    logsumexp = jnp.pad(logsumexp, ((0, 0), (0, 0), (0, total - logsumexp.shape[2])))

    def of_row(q, k, v, ids, out, logsumexp, d_out):
        kept = (q, k, v, ids, None, out, logsumexp, made.dq_mask_info, made.dkv_mask_info)
        options = {**made.kwargs, "save_residuals": False}
        found = kernel._splash_attention_bwd(**options, res=kept, do=d_out)
        return found[3:6]

    with precisely(q.dtype):
        d_q, d_k, d_v = jax.vmap(of_row)(qs, ks, vs, ids, outs, logsumexp, d_outs)
    length, width = q.shape[1], q.shape[3]
    d_q, d_k, d_v = (each[:, :, :length, :width] for each in (d_q, d_k, d_v))
    d_q = (d_q.swapaxes(1, 2).astype(jnp.float32) * settings.scale).astype(q.dtype)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


def _kernel(settings: AttentionSettings, length: int, heads: int, save_residuals: bool) -> Any:
    """Return the kernel for rows of this length: its masks and block sizes."""
    total = _total(length)
    mask: Any = masks.CausalMask((total, total))
    if settings.window is not None and settings.window < total:
        mask = masks.LocalMask((total, total), (settings.window - 1, 0), 0)
    block = functools.reduce(
        lambda best, size: size if total % size == 0 else best, (128, 256, LARGEST_BLOCK)
    )
    sizes: Any = kernel.BlockSizes
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        interpret=settings.interpret,
    )


def _operands(settings: AttentionSettings, q: Array, k: Array, v: Array) -> tuple:
    """Return q with the scale applied, k and v, [B, heads, T, H] padded with zeros."""
    q = (q.astype(jnp.float32) * settings.scale).astype(q.dtype).swapaxes(1, 2)
    return _padded(q), _padded(k), _padded(v)


def _padded(x: Array) -> Array:
    """Return [B, heads, T, H] with zeros up to multiples of 128 in T and H."""
    more = (_total(x.shape[2]) - x.shape[2], -x.shape[3] % LANES)
    return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1]))) if any(more) else x


def _total(length: int) -> int:
    """Return the padded length: a multiple of a large block where that costs little."""
    step = LARGEST_BLOCK if length > 4 * LARGEST_BLOCK else LANES
    return -(-length // step) * step


def _segments(layout: Layout, total: int) -> kernel.SegmentIds:
    ids = jnp.pad(layout.segments, ((0, 0), (0, total - layout.segments.shape[1])))
    return kernel.SegmentIds(ids, ids)
