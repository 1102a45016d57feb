"""One decoder for all model families, in Flax NNX: token ids -> final hidden states.

    x -> x + attention(norm(x)) -> x + mlp(norm(x)) -> ... -> norm(x)

The parameters of all layers are stacked on a leading axis, which training scans over. Prefill and
decoding use one module and one cache buffer for each layer, because XLA copies a cache that passes
through a scan at every step. Logits, losses, sampling and the layout of a cache are elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from fireopd_jax.models.architecture import AttentionKind, DecoderConfig
from fireopd_jax.models.layers import MLP, Attention, AttentionFn, norm
from fireopd_jax.models.lora import Adapters, add
from fireopd_jax.models.moe import MoE
from fireopd_jax.models.placement import Placement
from fireopd_jax.models.quantized import is_quantized
from fireopd_jax.models.rope import rotary
from fireopd_jax.models.shares import Shares, of_own_rows, of_replica, on_own_rows, sharing
from fireopd_jax.ops.attention import SAVED, attention
from fireopd_jax.types import Array

Cache = tuple[Any, ...]
"""Keys and values of each layer; the layout is private to the cache's class."""
CachedAttention = Callable[..., tuple[Array, Any]]
"""`(a layer's cache, its window, q, k, v, scale) -> (attention output, updated cache)`; see
`AttentionFn`."""
Remat = Literal["none", "full", "dots"]
"""What the backward pass recomputes: nothing, whole layers, or all but matrix products."""

WHOLE = Shares()
NO_WINDOW = 2**30
"""A window larger than any distance, where layers with and without one are scanned over."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the tokens of a batch belong, and how attention among them is computed."""

    segments: Int32[Array, "B S"]
    positions: Int32[Array, "B S"]
    attention: str | None
    local: bool
    """Whether the rows are those of one device (in a `shard_map`)."""


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each with a residual connection."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        self.post_norms = c.post_norms
        self.input_layernorm = norm(c, c.hidden_size, rngs=rngs)
        self.self_attn = Attention(c, rngs=rngs)
        self.post_attention_layernorm = norm(c, c.hidden_size, rngs=rngs)
        if c.post_norms:
            self.pre_feedforward_layernorm = norm(c, c.hidden_size, rngs=rngs)
            self.post_feedforward_layernorm = norm(c, c.hidden_size, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs) if c.moe is None else MoE(c, rngs=rngs)

    def __call__(self, x: Array, rope, attention: AttentionFn, shares: Shares = WHOLE):
        """Return the hidden states and the updated cache; a device computes its `shares`."""
        of_attention, of_mlp = shares.attention, shares.mlp
        rows = of_attention.gathered(self.input_layernorm(x))
        out, cache = self.self_attn(rows, rope, attention)
        out = of_attention.summed(out)
        if self.post_norms:
            x = x + self.post_attention_layernorm(out)
            out = self.mlp(of_mlp.gathered(self.pre_feedforward_layernorm(x)))
            return x + self.post_feedforward_layernorm(of_mlp.summed(out)), cache
        x = x + out
        out = self.mlp(of_mlp.gathered(self.post_attention_layernorm(x)))
        return x + of_mlp.summed(out), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head matrix is a property."""

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
        """The output matrix, one row for each token id, in the compute dtype."""
        table = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return table[...].astype(self.config.dtype)

    def embed(self, tokens: Int32[Array, "B S"], mesh: Mesh | None = None) -> Float[Array, "B S D"]:
        """Return the token embeddings, the input of the first layer; `mesh` shards the table."""
        c, table = self.config, self.embed_tokens[...]
        if (on := sharing(mesh, tokens.shape[0])) is not None:
            x = of_own_rows(table, tokens, on, c.dtype)
        else:
            x = table.astype(c.dtype)[tokens]
        # As in Gemma, sqrt(width) is rounded to the compute dtype first.
        return x * jnp.asarray(c.hidden_size**0.5, c.dtype) if c.scale_embeddings else x

    def rope(self, kind: AttentionKind, positions: Int32[Array, "B N"]) -> tuple[Array, Array]:
        """Return the RoPE tables (cos, sin) of the positions for a layer type."""
        return rotary(positions, self.config.head_dim, kind.theta, kind.scaling)

    def __call__(
        self,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        segments: Int32[Array, "B S"],
        *,
        adapters: Adapters | None = None,
        remat: Remat = "none",
        attention: str | None = None,
        mesh: Mesh | None = None,
    ) -> Float[Array, "B S D"]:
        """Return the final hidden states of whole sequences.

        Each token attends to the earlier ones of its segment; segment 0 is padding, whose states
        are finite and mean nothing. `positions` count the tokens of a segment. Scaled `adapters`
        are merged into one layer at a time, so that no merged copy of the model exists. `attention`
        names an implementation (`ops.attention`); `mesh` has the devices of the rows.
        """
        x = self.embed(tokens, mesh)
        graph, stacked = nnx.split(self.layers)
        stacked = nnx.to_pure_dict(stacked)
        low_rank = {} if adapters is None else adapters["layers"]
        kinds = list(dict.fromkeys(self.config.kinds))
        on, shares = sharing(mesh, tokens.shape[0]), WHOLE
        if on is not None:
            shares = Shares.of(self.config, on)
            segments, positions = of_replica((segments, positions), shares, on)

        windows = [kind.window for kind in kinds]
        ropes = [self.rope(kind, positions) for kind in kinds]
        # A kernel's masks may depend on a static window; different ones are traced.
        static = windows[0] if len(set(windows)) == 1 else None

        def apply(x, layer, low_rank, rope, segments, positions, window):
            layer = add(layer, low_rank) if low_rank else layer
            places = Places(segments, positions, attention, on is not None)
            attend = uncached(places, static if window is None else window)
            return nnx.merge(graph, layer)(x, rope, attend, shares)[0]

        if on is not None:
            apply = on_own_rows(apply, shares, on, stacked, low_rank)

        def run(x, layer, low_rank, rope, window=None):
            return apply(x, layer, low_rank, rope, segments, positions, window)

        run = with_remat(run, remat, sharded=on is not None and Placement(on).parts > 1)
        if len(kinds) == 1:

            def body(x, layer):
                layer, pairs = layer
                return run(x, layer, pairs, ropes[0]), None

            return self.norm(jax.lax.scan(body, x, (stacked, low_rank))[0])

        # Several layer types: the scan also runs over the index of each layer's type.
        tables: dict[str, Any] = {"rope": jax.tree.map(lambda *each: jnp.stack(each), *ropes)}
        if len(set(windows)) > 1:
            counts = [NO_WINDOW if window is None else window for window in windows]
            tables["window"] = jnp.array(counts, jnp.int32)
        index = jnp.array([kinds.index(kind) for kind in self.config.kinds])

        def pick(x, layer):
            layer, pairs, kind = layer
            return run(x, layer, pairs, **jax.tree.map(lambda leaf: leaf[kind], tables)), None

        return self.norm(jax.lax.scan(pick, x, (stacked, low_rank, index))[0])

    def extend(
        self,
        layers: list[Layer],
        tokens: Int32[Array, "B N"],
        positions: Int32[Array, "B N"],
        attend: CachedAttention,
        cache: Cache,
    ) -> tuple[Float[Array, "B N D"], Cache]:
        """Return the final hidden states of N new tokens of each row, and the updated cache.

        `attend` writes their keys and values to a layer's cache and attends to it.
        """
        x, new = self.embed(tokens), []
        ropes = {kind: self.rope(kind, positions) for kind in dict.fromkeys(self.config.kinds)}
        for layer, kind, kept in zip(layers, self.config.kinds, cache, strict=True):
            x, kept = layer(x, ropes[kind], functools.partial(attend, kept, kind.window))
            new.append(kept)
        return self.norm(x), tuple(new)


def uncached(places: Places, window: int | Array | None) -> AttentionFn:
    """Return attention among the new tokens alone, without a cache."""

    def run(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, None]:
        out = attention(
            q,
            k,
            v,
            places.segments,
            positions=places.positions if window is not None else None,
            window=window,
            scale=scale,
            implementation=places.attention,
            local=places.local,
        )
        return jnp.asarray(out), None

    return run


def with_remat(
    layer: Callable[..., Array], remat: Remat, *, sharded: bool = False
) -> Callable[..., Array]:
    """Return the layer function, wrapped in `jax.checkpoint` according to `remat`.

    With `sharded` parameters, what has been gathered for a layer is never saved.
    """
    if remat == "none" and not sharded:
        return layer
    policy = {"none": not_gathered, "dots": of_products, "full": None}[remat]
    # Inside a scan, common-subexpression elimination cannot undo the recomputation.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


_DENSE = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)


def of_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Return whether a value is the result of a matrix product or its sum, or of attention.

    Scores of attention have batch axes: they are the largest, and recomputed.
    """
    return (
        primitive.name in ("ragged_dot_general", "reduce_scatter")
        or _DENSE(primitive, *operands, **params)
        or _ATTENTION(primitive, *operands, **params)
    )


def not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Return whether a value may be saved: not what is gathered, cast or in another shape."""
    return primitive.name not in ("all_gather", "convert_element_type", "reshape")


def parameter_count(params: dict[str, Any]) -> int:
    """Return the number of elements of all parameters (arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_quantized))
