"""The parts of a decoder layer: linear maps, norms, attention, the gated MLP."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.quantized import Quantized, multiply
from fireopd_jax.models.rope import rotate
from fireopd_jax.ops.few_rows import few_rows_product
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array, pytree


@pytree
class TransposedKernel:
    """A kernel stored transposed: faster on a CPU for products with few rows (`ops.few_rows`)."""

    rows: Float[Array, "O I"]


AttentionFn = Callable[[Array, Array, Array, float], tuple[Array, Any]]
"""Queries [B, N, heads, H], new keys and values [B, K, N, H] and the scale of the scores -> the
attention output [B, N, heads, H], and the updated cache or None."""


class Linear(nnx.Linear):
    """A linear map applied to [B S, D], which XLA on a CPU runs faster than [B, S, D]."""

    def __call__(self, x: Array) -> Array:
        """Apply the map; the kernel may be an array, quantised or transposed."""
        rows, kernel = jnp.reshape(x, (-1, x.shape[-1])), self.kernel.get_value()
        if not isinstance(kernel, Quantized | TransposedKernel):
            return super().__call__(rows).reshape(*x.shape[:-1], -1)
        assert self.dtype is not None
        if isinstance(kernel, TransposedKernel):
            out = few_rows_product(rows.astype(self.dtype), kernel.rows.astype(self.dtype))
        else:
            out = multiply(rows, kernel, self.dtype)
        if self.bias is not None:
            out += self.bias[...].astype(out.dtype)[None]
        return out.reshape(*x.shape[:-1], -1)


def linear(
    c: DecoderConfig, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs
) -> Linear:
    """Return a linear map in the model's dtypes."""
    return Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(c.dtype),
        param_dtype=jnp.dtype(c.param_dtype),
        precision=precision_of(c.dtype),
        rngs=rngs,
    )


class ZeroCentredNorm(nnx.Module):
    """RMS norm with the factor 1 + w, in float32: x (1 + w) / sqrt(mean(x^2) + epsilon)."""

    def __init__(self, c: DecoderConfig, width: int):
        self.epsilon = c.rms_norm_eps
        self.scale = nnx.Param(jnp.zeros(width, c.param_dtype))

    def __call__(self, x: Array) -> Array:
        """Return x (1 + w) / sqrt(mean(x^2) + epsilon), rounded to the dtype of x at the end."""
        wide = x.astype(jnp.float32)
        square = (wide**2).mean(axis=-1, keepdims=True)
        factor = 1 + self.scale[...].astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(square + self.epsilon)
        return (wide * factor.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def norm(c: DecoderConfig, width: int, *, rngs: nnx.Rngs) -> nnx.RMSNorm | ZeroCentredNorm:
    """Return an RMS norm of the kind that the model uses."""
    if c.zero_centered_norms:
        return ZeroCentredNorm(c, width)
    return nnx.RMSNorm(
        width,
        epsilon=c.rms_norm_eps,
        dtype=jnp.dtype(c.dtype),
        param_dtype=jnp.dtype(c.param_dtype),
        rngs=rngs,
    )


def activation(c: DecoderConfig, x: Array) -> Array:
    """Apply the activation function of the MLP's gate."""
    return jax.nn.silu(x) if c.hidden_act == "silu" else jax.nn.gelu(x, approximate=True)


class Attention(nnx.Module):
    """Grouped-query attention; the caller's `attention` does masking and caching."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        heads, shared = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = linear(c, c.hidden_size, heads, bias=c.attention_bias, rngs=rngs)
        self.k_proj = linear(c, c.hidden_size, shared, bias=c.attention_bias, rngs=rngs)
        self.v_proj = linear(c, c.hidden_size, shared, bias=c.attention_bias, rngs=rngs)
        self.o_proj = linear(c, heads, c.hidden_size, bias=c.attention_output_bias, rngs=rngs)
        if c.qk_norm:
            self.q_norm = norm(c, c.head_dim, rngs=rngs)
            self.k_norm = norm(c, c.head_dim, rngs=rngs)

    def __call__(self, x: Array, rope, attention: AttentionFn):
        """Return attention's output before the residual connection, and the updated cache."""
        c = self.config

        def heads(projection):
            return projection(x).reshape(*x.shape[:2], -1, c.head_dim)

        q, k = heads(self.q_proj), heads(self.k_proj)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope).swapaxes(1, 2)
        v = heads(self.v_proj).swapaxes(1, 2)
        out, cache = attention(q, k, v, (c.query_pre_attn_scalar or c.head_dim) ** -0.5)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """A gated MLP (SwiGLU or GeGLU): W_down (act(W_gate x) * W_up x)."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.gate_proj = linear(c, c.hidden_size, c.intermediate_size, bias=c.mlp_bias, rngs=rngs)
        self.up_proj = linear(c, c.hidden_size, c.intermediate_size, bias=c.mlp_bias, rngs=rngs)
        self.down_proj = linear(c, c.intermediate_size, c.hidden_size, bias=c.mlp_bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Return W_down (act(W_gate x) * W_up x)."""
        return self.down_proj(activation(self.config, self.gate_proj(x)) * self.up_proj(x))
