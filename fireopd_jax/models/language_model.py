"""A model as pure functions of its parameters, and the place where tokens and predictions align.

    params, prompts, responses -> hidden states that predict each response token -> log-prob,
    entropy

A sequence is laid as [prompt padded to P | response padded to T]: positions count only real
tokens, and padding is invisible. The hidden state that predicts response token 0 is the prompt's
last; the one that predicts token t is that of token t - 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int32

from fireopd_jax.models.decoder import Decoder, DecoderConfig, Layer, Remat
from fireopd_jax.models.layers import Turned
from fireopd_jax.models.lora import Adapters
from fireopd_jax.models.placement import place_relaid, tensor_devices
from fireopd_jax.models.quantized import Quantize, is_quantized, quantize_params
from fireopd_jax.ops.dispatch import PLAIN
from fireopd_jax.ops.few_rows import few_rows_product
from fireopd_jax.ops.head import HeadOptions, head_stats
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.sharding.mesh import AXES
from fireopd_jax.types import Array, TokenStats

Params = dict[str, Any]
"""Nested dict of arrays."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder without its parameters: hashable, so that jitted functions may close over it."""

    config: DecoderConfig
    vocab_size: int
    """Rows of the embedding and of the head."""
    valid: int | None = None
    """Rows that are tokens, where the others only pad the head: they have no probability."""
    quantize: Quantize | None = None
    """What the kernels are kept in, of a model that does not learn; null: the parameters' type."""
    exchange: tuple[int, int] | None = None
    """Two ids that change places in what the model says: its own end and the student's, where it
    scores one that ends otherwise. Its parameters are then those of `exchanged`."""

    @property
    def size(self) -> int:
        """Count the ids that the model may say."""
        return self.vocab_size if self.valid is None else self.valid

    def _module(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(self.config, self.vocab_size, rngs=rngs)

    def init(self, key: Array) -> Params:
        """Draw fresh parameters."""
        module = self._module(nnx.Rngs(jnp.asarray(key)))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return params if self.quantize is None else quantize_params(params)

    def exchanged(self, params: Params) -> Params:
        """Let the head's rows of the two ids change places; nothing else is copied."""
        if self.exchange is None:
            return params
        name = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        one, other = self.exchange
        rows, places = params[name][jnp.array([other, one])], jnp.array([one, other])
        return params | {name: params[name].at[places].set(rows)}

    def bind(self, params: Params) -> Decoder:
        """Put the parameters into the module."""
        graph, _ = nnx.split(nnx.eval_shape(lambda: self._module(nnx.Rngs(0))))
        return nnx.merge(graph, params)

    def relay(self, params: Params, mesh: Mesh | None = None) -> Params:
        """Lay parameters out for decoding: a tree a layer, matrices in the type of the computation.

        They are split over the tensor axis of `mesh`. On a CPU, where nothing is split, kernels lie
        transposed (`Turned`). A loop over layers that are stacked would make XLA hoist a second
        copy of all of them.
        """
        dtype = jnp.dtype(self.config.dtype)
        alone = mesh is None or tensor_devices(mesh) == 1
        turns = alone and jax.default_backend() == "cpu"

        def cast(x: Any) -> Any:
            # Quantised kernels keep their scales, norms their weights.
            return x if is_quantized(x) or x.ndim < 2 else jnp.asarray(x, dtype)

        def turn(path: tuple[Any, ...], leaf: Any) -> Any:
            kernel = path[-1].key == "kernel" and not is_quantized(leaf)
            return Turned(leaf.T) if turns and kernel else leaf

        def layer(index: int) -> Params:
            own = jax.tree.map(
                lambda leaf: cast(leaf[index]), params["layers"], is_leaf=is_quantized
            )
            return jax.tree.map_with_path(turn, own, is_leaf=is_quantized)

        rest = {name: cast(leaf) for name, leaf in params.items() if name not in ("layers", "norm")}
        layers = tuple(layer(index) for index in range(self.config.num_hidden_layers))
        relaid = rest | {"norm": params["norm"], "layers": layers}
        if mesh is None or alone:
            return relaid
        return place_relaid(relaid, self.config, mesh)

    def bind_relaid(self, relaid: Params) -> tuple[Decoder, list[Layer]]:
        """Put what `relay` gives into the module and its layers."""
        shapes = nnx.eval_shape(lambda: self._module(nnx.Rngs(0)))
        graph, stacked = nnx.split(shapes)
        absent = nnx.to_pure_dict(stacked)["layers"]  # the decoder's own stack is not looked at
        layer, _ = nnx.split(shapes.layers)
        layers = [nnx.merge(layer, each) for each in relaid["layers"]]
        return nnx.merge(graph, relaid | {"layers": absent}), layers

    def logits(self, decoder: Decoder, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Give the logits of one position a row, float32: what the sampler draws from.

        Softcapped; rows that only pad the head have -inf: to cut them off would leave a width that
        the sampler has to pad again.
        """
        head = decoder.head
        logits = few_rows_product(hidden.astype(head.dtype), head, jnp.float32)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * jnp.tanh(logits / cap)
        width = logits.shape[1]
        if self.size == width:
            return logits
        return jnp.where(jnp.arange(width)[None] < self.size, logits, -jnp.inf)

    def head_options(
        self,
        temperature: Float[Array, ""] | float = 1.0,
        implementation: str | None = None,
        chunk: int | None = None,
        mesh: Mesh | None = None,
    ) -> HeadOptions:
        """Return the options of `ops.head` for this model; rows are split over all of `mesh`."""
        sharding = None
        if mesh is not None and mesh.size > 1 and implementation != PLAIN:
            sharding = HeadSharding(mesh, AXES)
        return {
            "logit_scale": 1.0 / temperature,
            "softcap": self.config.final_logit_softcapping,
            "valid": self.valid,
            "implementation": implementation,
            "chunk": chunk,
            "sharding": sharding,
        }

    def response_hidden(
        self,
        params: Params,
        prompt: Int32[Array, "B P"],
        prompt_length: Int32[Array, " B"],
        tokens: Int32[Array, "B T"],
        mask: Bool[Array, "B T"],
        *,
        adapters: Adapters | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        """Return the states that predict each response token, and the head that reads them.

        Differentiable in `params` and scaled `adapters`.
        """
        decoder = self.bind(params)
        sequence, positions, visible = lay(prompt, prompt_length, tokens, mask)
        if self.exchange is not None and self.config.tie_word_embeddings:
            # The rows that it reads by have changed places with those that it says by.
            one, other = self.exchange
            swapped = jnp.where(sequence == one, other, sequence)
            sequence = jnp.where(sequence == other, one, swapped)
        hidden = decoder(sequence, positions, visible, adapters=adapters, remat=remat)
        return predicting(hidden, prompt_length, prompt.shape[1]), decoder.head

    def response_stats(
        self,
        params: Params,
        prompt: Int32[Array, "B P"],
        prompt_length: Int32[Array, " B"],
        tokens: Int32[Array, "B T"],
        mask: Bool[Array, "B T"],
        temperature: Float[Array, ""] | float = 1.0,
        implementation: str | None = None,
        chunk: int | None = None,
        *,
        adapters: Adapters | None = None,
        remat: Remat = "none",
    ) -> TokenStats:
        """Score given responses: log-prob of each token and entropy of its distribution, f32[B, T].

        Differentiable in `params` and scaled `adapters`. Values where `mask` is false mean nothing.
        """
        hidden, head = self.response_hidden(
            params, prompt, prompt_length, tokens, mask, adapters=adapters, remat=remat
        )
        stats = head_stats(
            hidden, head, tokens, **self.head_options(temperature, implementation, chunk)
        )
        return TokenStats(logprob=stats.logprob, entropy=stats.entropy)


def lay(
    prompt: Int32[Array, "B P"],
    prompt_length: Int32[Array, " B"],
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> tuple[Int32[Array, "B S"], Int32[Array, "B S"], Bool[Array, "B S"]]:
    """Lay prompts and responses side by side: tokens, positions, visibility, with S = P + T."""
    (rows, width), response = prompt.shape, tokens.shape[1]
    slots = jnp.broadcast_to(jnp.arange(width), (rows, width))
    after = prompt_length[:, None] + jnp.arange(response)[None]
    sequence = jnp.concatenate([prompt, tokens], axis=1)
    positions = jnp.concatenate([slots, after], axis=1)
    visible = jnp.concatenate([slots < prompt_length[:, None], mask], axis=1)
    return sequence, positions, visible


def last_of_prompt(
    hidden: Float[Array, "B S D"], prompt_length: Int32[Array, " B"]
) -> Float[Array, "B D"]:
    """Pick the hidden state of each prompt's last token."""
    last = jnp.maximum(prompt_length - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def predicting(
    hidden: Float[Array, "B S D"], prompt_length: Int32[Array, " B"], prompt_width: int
) -> Float[Array, "B T D"]:
    """Align: at index t stands the hidden state that predicts response token t."""
    first = last_of_prompt(hidden, prompt_length)
    return jnp.concatenate([first[:, None], hidden[:, prompt_width:-1]], axis=1)


def same_structure(params: Params, model: LanguageModel) -> bool:
    """Tell whether `params` have the names and shapes of `model`."""
    expected = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.structure(params) == jax.tree.structure(expected) and all(
        a.shape == b.shape
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True)
    )
