"""A Qwen3 decoder in Flax NNX: tokens -> hidden states, in training, prefill and decoding.

    x -> x + attention(norm(x)) -> x + mlp(norm(x)) -> ... -> norm(x)

The parameters of all layers are stacked on a leading axis. Training scans over them; decoding
takes them apart and keeps one cache buffer a layer, because a cache that goes through a scan is
copied at every step. The module knows nothing of logits, losses or sampling.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int32
from pydantic import PositiveFloat, PositiveInt, model_validator

from fireopd_jax.config import config
from fireopd_jax.ops.attention import attend
from fireopd_jax.types import Array

Cache = tuple[tuple[Array, Array], ...]
"""Keys and values of each layer, each [B, K, S, H]."""


@config
class DecoderConfig:
    """Architecture of an embedded model, in the names of Hugging Face's `config.json`."""

    vocab_size: PositiveInt | None = None
    """Rows of the embedding and of the head; by default the tokenizer's size."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt = 3
    """Decoder layers."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_key_value_heads: PositiveInt = 2
    """Key and value heads; divides the query heads."""
    head_dim: PositiveInt = 32
    """Width of a head; even."""
    intermediate_size: PositiveInt = 384
    """Width of the gated MLP."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embedding."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square before its root."""
    tie_word_embeddings: bool = True
    """The head is the embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, statistics and losses are float32."""

    @model_validator(mode="after")
    def check_heads(self):
        """Refuse head counts and widths that no attention can have."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads "
                f"({self.num_key_value_heads} does not divide {self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (it is {self.head_dim})")
        return self


def rotary(positions: Int32[Array, "B S"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Give the cosine and sine of each position's rotation, f32[B, S, 1, head_dim / 2]."""
    frequency = theta ** (-jnp.arange(head_dim // 2, dtype=jnp.float32) * 2 / head_dim)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B S N H"], rope: tuple[Array, Array]) -> Float[Array, "B S N H"]:
    """Rotate the pair (i, i + H/2) of each head by its position's angle, in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Linear(nnx.Linear):
    """A linear map over the rows of one matrix, which XLA:CPU runs faster than [B, S, D]."""

    def __call__(self, x: Array) -> Array:
        """Multiply by the kernel."""
        return super().__call__(jnp.reshape(x, (-1, x.shape[-1]))).reshape(*x.shape[:-1], -1)


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(c.dtype)
        self.head_dim = c.head_dim

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = nnx.RMSNorm(c.head_dim, epsilon=c.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.k_norm = nnx.RMSNorm(c.head_dim, epsilon=c.rms_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, rope, mask: Array, cache, slot: Array | int):
        """Attend over the tokens themselves, or over a cache that they are first written to."""

        def heads(projection):
            return projection(x).reshape(*x.shape[:2], -1, self.head_dim)

        q = rotate(self.q_norm(heads(self.q_proj)), rope)
        k = rotate(self.k_norm(heads(self.k_proj)), rope).swapaxes(1, 2)
        v = heads(self.v_proj).swapaxes(1, 2)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=2)
                for old, new in zip(cache, (k, v), strict=True)
            )
            cache = (k, v)
        out = attend(q, k, v, mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=False, dtype=jnp.dtype(c.dtype), rngs=rngs)

        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def __call__(self, x: Array) -> Array:
        """Gate, widen, and come back."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One layer; with a cache, it writes its keys and values there and attends to all of it."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(
                c.hidden_size, epsilon=c.rms_norm_eps, dtype=jnp.dtype(c.dtype), rngs=rngs
            )

        self.input_layernorm = norm()
        self.self_attn = Attention(c, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x: Array, rope, mask: Array, cache=None, slot: Array | int = 0):
        """Give the hidden states, and the cache as it is now."""
        out, cache = self.self_attn(self.input_layernorm(x), rope, mask, cache, slot)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """The whole model."""

    def __init__(self, c: DecoderConfig, vocab_size: int, *, rngs: nnx.Rngs):
        self.config = c

        @nnx.split_rngs(splits=c.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(c, rngs=rngs)

        scale = nnx.initializers.normal(0.02)
        shape = (vocab_size, c.hidden_size)
        self.embed_tokens = nnx.Param(scale(rngs.params(), shape, jnp.float32))
        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(
            c.hidden_size, epsilon=c.rms_norm_eps, dtype=jnp.dtype(c.dtype), rngs=rngs
        )
        if not c.tie_word_embeddings:
            self.lm_head = nnx.Param(scale(rngs.params(), shape, jnp.float32))

    @property
    def head(self) -> Float[Array, "V D"]:
        """The head, one row a word."""
        table = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return table[...].astype(self.config.dtype)

    def embed(self, tokens: Int32[Array, "B S"], positions: Int32[Array, "B S"]):
        """Give the first hidden states and the rotations of the positions."""
        x = self.embed_tokens[...].astype(self.config.dtype)[tokens]
        return x, rotary(positions, self.config.head_dim, self.config.rope_theta)

    def __call__(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        visible: Bool[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Run the model over whole sequences: causal, and blind to what is not visible."""
        x, rope = self.embed(tokens, positions)
        mask = visible[:, None, :] & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
        graph, stacked = nnx.split(self.layers)

        def body(x, layer):
            return nnx.merge(graph, layer)(x, rope, mask)[0], None

        return self.norm(jax.lax.scan(body, x, stacked)[0])

    def unstacked(self) -> list[Layer]:
        """Take the stacked layers apart: one set of parameters a layer."""
        graph, stacked = nnx.split(self.layers)
        return [
            nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
            for i in range(self.config.num_hidden_layers)
        ]

    def extend(
        self,
        layers: list[Layer],
        tokens: Int32[Array, "B N"],
        positions: Int32[Array, "B N"],
        visible: Bool[Array, "B S"],
        cache: Cache,
        slot: Int32[Array, ""] | int,
    ) -> tuple[Float[Array, "B N D"], Cache]:
        """Run N new tokens in the cache slots from `slot` on: P to prefill, 1 to decode."""
        x, rope = self.embed(tokens, positions)
        reach = slot + jnp.arange(tokens.shape[1])
        past = jnp.arange(visible.shape[1])[None, :] <= reach[:, None]
        mask = visible[:, None, :] & past[None]
        new = []
        for layer, buffers in zip(layers, cache, strict=True):
            x, buffers = layer(x, rope, mask, buffers, slot)
            new.append(buffers)
        return self.norm(x), tuple(new)

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """Allocate the cache; every buffer is its own."""
        c = self.config
        shape = (rows, c.num_key_value_heads, slots, c.head_dim)
        return tuple(
            (jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))
            for _ in range(c.num_hidden_layers)
        )


def parameter_count(params: dict[str, Any]) -> int:
    """Count the elements of all parameters, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
