"""Attention on an NVIDIA GPU by JAX's Pallas kernels in Triton, forward and backward.

Causality and segments, without a window. Their products of float32 would be TF32, so only 16-bit
operands are supported. Keys are repeated for the queries that share them. cuDNN's kernel, which
`jax.nn.dot_product_attention` calls, has no segments: it cannot do packed rows, nor rows with
padding between prompt and response. Run in JAX's interpreter, never on a GPU.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernel
from jaxtyping import Float, Float32

from fireopd_jax.ops.attention.masks import Layout
from fireopd_jax.ops.attention.settings import AttentionSettings
from fireopd_jax.types import Array

BLOCK = 128
BACKWARD_BLOCK = 32


def unsupported_reason(
    length: int, heads: int, key_heads: int, width: int, dtype: str, window: int | str | None
) -> str | None:
    """Return why the kernel does not support the operands, or None."""
    if window is not None:
        return "it has no window"
    if dtype not in ("bfloat16", "float16"):
        return f"dtype {dtype} is not supported, only bfloat16 and float16"
    if width not in (32, 64, 128):
        return f"head width {width} is not supported, only 32, 64 and 128"
    return None


def forward(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Return the output in the dtype of v, and the log-sum-exp of each query's scores."""
    operands = _operands(q, k, v, layout)
    run: Any = kernel._mha_forward
    out, kept = run(*operands, **_options(settings))
    length = q.shape[1]
    # The kernel's exponentials are powers of two.
    return out[:, :length].astype(v.dtype), kept[5][:, :, :length] * jnp.log(2.0)


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
    """Return d q, d k, d v in the dtypes of q, k, v."""
    operands = _operands(q, k, v, layout)
    more = -q.shape[1] % BLOCK
    statistics = jnp.pad(logsumexp / jnp.log(2.0), ((0, 0), (0, 0), (0, more)))
    kept = (*operands, _padded(out), statistics)
    run: Any = kernel._mha_backward
    found = run(**_options(settings), res=kept, do=_padded(d_out))
    d_q, d_k, d_v = (each[:, : q.shape[1]] for each in found[:3])

    def summed(each: Array, like: Array) -> Array:
        """Return the gradient of the shared heads: the sum over the queries' heads."""
        grouped = each.reshape(*each.shape[:2], k.shape[1], -1, each.shape[3])
        total = grouped.astype(jnp.float32).sum(axis=3).swapaxes(1, 2)
        return total.astype(like.dtype)

    return d_q.astype(q.dtype), summed(d_k, k), summed(d_v, v)


def _operands(q: Array, k: Array, v: Array, layout: Layout) -> tuple[Array, ...]:
    """Return q, k, v of all heads [B, T, N, H] and the segments, padded to whole blocks."""
    group = q.shape[2] // k.shape[1]
    keys = (jnp.repeat(each.swapaxes(1, 2), group, axis=2) for each in (k, v))
    segments = jnp.pad(layout.segments, ((0, 0), (0, -q.shape[1] % BLOCK)))
    return _padded(q), *(_padded(each) for each in keys), segments


def _padded(x: Array) -> Array:
    more = -x.shape[1] % BLOCK
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x


def _options(settings: AttentionSettings) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        f"block_{name}": BACKWARD_BLOCK for name in ("q_dkv", "kv_dkv", "q_dq", "kv_dq")
    }
    return {
        "sm_scale": settings.scale,
        "causal": True,
        "block_sizes": kernel.BlockSizes(block_q=BLOCK, block_k=BLOCK, **sizes),
        "backward_pass_impl": "triton",
        "num_warps": None,
        "num_stages": 2,
        "grid": None,
        "interpret": settings.interpret,
        "debug": False,
        "return_residuals": False,
    }
