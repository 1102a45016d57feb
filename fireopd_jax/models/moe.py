"""A mixture of experts without capacity limits: no token is dropped.

    x -> router -> the k most probable experts -> tokens sorted by expert -> ragged products
      -> restored to token order -> weighted sum

Each row of a ragged product depends on its own token alone, so padding tokens are routed like
others and do not change the results of real tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.layers import activation, linear
from fireopd_jax.models.quantized import Quantized, ragged_multiply
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.types import Array


class Experts(nnx.Module):
    """The kernels of all experts of a layer, stacked: [E, inputs, outputs]."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        assert c.moe is not None
        count, inner = c.moe.num_experts, c.moe.moe_intermediate_size
        draw = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)

        def kernel(inputs: int, outputs: int) -> nnx.Param:
            return nnx.Param(draw(rngs.params(), (count, inputs, outputs), c.param_dtype))

        self.gate_proj = kernel(c.hidden_size, inner)
        self.up_proj = kernel(c.hidden_size, inner)
        self.down_proj = kernel(inner, c.hidden_size)


class MoE(nnx.Module):
    """Router and experts: an MLP layer of a mixture-of-experts model."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        assert c.moe is not None
        self.config = c
        self.gate = linear(c, c.hidden_size, c.moe.num_experts, rngs=rngs)
        self.experts = Experts(c, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Return the sum of each token's expert outputs, weighted by the router's probabilities."""
        c, moe = self.config, self.config.moe
        assert moe is not None
        rows = x.reshape(-1, x.shape[-1])
        probability = jax.nn.softmax(self.gate(rows).astype(jnp.float32), axis=-1)
        weight, expert = jax.lax.top_k(probability, moe.num_experts_per_tok)
        if moe.norm_topk_prob:
            weight = weight / weight.sum(axis=-1, keepdims=True)
        order = jnp.argsort(expert.reshape(-1), stable=True)
        sizes = jnp.bincount(expert.reshape(-1), length=moe.num_experts).astype(jnp.int32)

        def product(inputs: jax.Array, param: nnx.Param) -> Array:
            kernel = param.get_value()
            if isinstance(kernel, Quantized):
                return ragged_multiply(inputs, kernel, sizes, expert.reshape(-1)[order])
            kernel, precision = kernel.astype(inputs.dtype), precision_of(inputs.dtype)
            return jax.lax.ragged_dot(inputs, kernel, sizes, precision)

        sent = jnp.asarray(rows, c.dtype)[order // moe.num_experts_per_tok]
        gate, up = product(sent, self.experts.gate_proj), product(sent, self.experts.up_proj)
        out = product(jnp.multiply(activation(c, gate), up), self.experts.down_proj)
        out = out[jnp.argsort(order)].reshape(*weight.shape, -1)
        weight, precision = weight.astype(out.dtype), precision_of(out.dtype)
        return jnp.einsum("nkd,nk->nd", out, weight, precision=precision).reshape(x.shape)
