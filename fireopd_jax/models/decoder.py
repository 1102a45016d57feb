"""One decoder for all families, in Flax NNX: tokens -> hidden states, to train, prefill, decode.

    x -> x + attention(norm(x)) -> x + mlp(norm(x)) -> ... -> norm(x)

The parameters of all layers are stacked on a leading axis. Training scans over them; decoding
takes them apart and keeps one cache buffer a layer, because a cache that goes through a scan is
copied at every step. The module knows nothing of logits, losses or sampling, nor how a cache is
laid out.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int32

from fireopd_jax.models.architecture import AttentionKind, DecoderConfig
from fireopd_jax.models.layers import MLP, Attention, Mix, norm
from fireopd_jax.models.lora import Adapters, add
from fireopd_jax.models.moe import MoE
from fireopd_jax.models.quantized import is_quantized
from fireopd_jax.models.rope import rotary
from fireopd_jax.ops.attention import attend
from fireopd_jax.types import Array

Cache = tuple[Any, ...]
"""Keys and values of each layer, in a layout that only its owner knows."""
CachedAttention = Callable[..., tuple[Array, Any]]
"""`(a layer's cache, its window, q, k, v, scale) -> (mixed values, the cache)`: see `Mix`."""
Sight = tuple[tuple[Array, Array], Array]
"""What a kind of layer sees: the rotations of the positions, and the mask."""
Remat = Literal["none", "full", "dots"]
"""What the backward pass computes again: nothing, all of a layer, or all but its products."""


class Layer(nnx.Module):
    """One layer: attention and MLP, each added to what comes in."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        self.post_norms = c.post_norms
        self.input_layernorm = norm(c, c.hidden_size, rngs=rngs)
        self.self_attn = Attention(c, rngs=rngs)
        self.post_attention_layernorm = norm(c, c.hidden_size, rngs=rngs)
        if c.post_norms:
            self.pre_feedforward_layernorm = norm(c, c.hidden_size, rngs=rngs)
            self.post_feedforward_layernorm = norm(c, c.hidden_size, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs) if c.moe is None else MoE(c, rngs=rngs)

    def __call__(self, x: Array, rope, mix: Mix):
        """Give the hidden states, and the cache as it is now."""
        out, cache = self.self_attn(self.input_layernorm(x), rope, mix)
        if self.post_norms:
            x = x + self.post_attention_layernorm(out)
            out = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(out), cache
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
        shape, dtype = (vocab_size, c.hidden_size), jnp.dtype(c.param_dtype)
        self.embed_tokens = nnx.Param(scale(rngs.params(), shape, dtype))
        self.layers = stack(rngs)
        self.norm = norm(c, c.hidden_size, rngs=rngs)
        if not c.tie_word_embeddings:
            self.lm_head = nnx.Param(scale(rngs.params(), shape, dtype))

    @property
    def head(self) -> Float[Array, "V D"]:
        """The head, one row a word."""
        table = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return table[...].astype(self.config.dtype)

    def embed(self, tokens: Int32[Array, "B S"]) -> Float[Array, "B S D"]:
        """Give the first hidden states."""
        c = self.config
        x = self.embed_tokens[...].astype(c.dtype)[tokens]
        # The root of the width is rounded to the type of the embeddings first.
        return x * jnp.asarray(c.hidden_size**0.5, c.dtype) if c.scale_embeddings else x

    def sights(
        self,
        positions: Int32[Array, "B N"],
        past: Bool[Array, "B N N"],
    ) -> dict[AttentionKind, Sight]:
        """Give rotations and mask of each kind of layer; a window counts positions."""

        def sight(kind: AttentionKind) -> Sight:
            rope = self.rope(kind, positions)
            if kind.window is None:
                return rope, past
            distance = positions[:, :, None] - positions[:, None, :]
            return rope, past & (distance < kind.window)

        return {kind: sight(kind) for kind in dict.fromkeys(self.config.kinds)}

    def rope(self, kind: AttentionKind, positions: Int32[Array, "B N"]) -> tuple[Array, Array]:
        """Give the rotations of the positions in layers of a kind."""
        return rotary(positions, self.config.head_dim, kind.theta, kind.scaling)

    def __call__(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        visible: Bool[Array, "B S"],
        *,
        adapters: Adapters | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "B S D"]:
        """Run the model over whole sequences: causal, and blind to what is not visible.

        Scaled `adapters` are added to each layer when its turn comes.
        """
        x = self.embed(tokens)
        mask = visible[:, None, :] & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
        sights = self.sights(positions, mask)
        graph, stacked = nnx.split(self.layers)
        low_rank = {} if adapters is None else adapters["layers"]
        kinds = list(sights)

        def run(x, layer, low_rank, rope, mask):
            layer = add(nnx.to_pure_dict(layer), low_rank) if low_rank else layer
            return nnx.merge(graph, layer)(x, rope, uncached(mask))[0]

        run = recomputed(run, remat)
        if len(kinds) == 1:
            rope, mask = sights[kinds[0]]

            def body(x, layer):
                layer, pairs = layer
                return run(x, layer, pairs, rope, mask), None

            return self.norm(jax.lax.scan(body, x, (stacked, low_rank))[0])

        # Layers of several kinds: the scan carries the index of each layer's kind.
        every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sights.values())
        index = jnp.array([kinds.index(kind) for kind in self.config.kinds])

        def pick(x, layer):
            layer, pairs, kind = layer
            rope, mask = jax.tree.map(lambda leaf: leaf[kind], every)
            return run(x, layer, pairs, rope, mask), None

        return self.norm(jax.lax.scan(pick, x, (stacked, low_rank, index))[0])

    def extend(
        self,
        layers: list[Layer],
        tokens: Int32[Array, "B N"],
        positions: Int32[Array, "B N"],
        attend: CachedAttention,
        cache: Cache,
    ) -> tuple[Float[Array, "B N D"], Cache]:
        """Run N new tokens of each row, which `attend` joins with those that the cache holds."""
        x, new = self.embed(tokens), []
        ropes = {kind: self.rope(kind, positions) for kind in dict.fromkeys(self.config.kinds)}
        for layer, kind, kept in zip(layers, self.config.kinds, cache, strict=True):
            x, kept = layer(x, ropes[kind], functools.partial(attend, kept, kind.window))
            new.append(kept)
        return self.norm(x), tuple(new)


def uncached(mask: Bool[Array, "B N N"]) -> Mix:
    """Attend among the new tokens alone."""
    return lambda q, k, v, scale: (attend(q, k, v, mask, scale), None)


def recomputed(layer: Callable[..., Array], remat: Remat) -> Callable[..., Array]:
    """Let the backward pass compute a layer again instead of keeping all that it needs."""
    if remat == "none":
        return layer
    # Attention's products have batch axes: they are the large ones, and are not kept.
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Within a scan nothing could merge the two computations again.
    return jax.checkpoint(layer, policy=dots if remat == "dots" else None, prevent_cse=False)


def parameter_count(params: dict[str, Any]) -> int:
    """Count the elements of all parameters, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_quantized))
