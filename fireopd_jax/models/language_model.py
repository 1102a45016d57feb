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
from fireopd_jax.models.layers import TransposedKernel
from fireopd_jax.models.lora import Adapters
from fireopd_jax.models.placement import shard_decode_layout, tensor_devices
from fireopd_jax.models.quantized import Quantize, is_quantized, quantize_params
from fireopd_jax.ops.dispatch import PLAIN
from fireopd_jax.ops.few_rows import few_rows_product
from fireopd_jax.ops.head import HeadOptions
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.sharding.mesh import AXES
from fireopd_jax.types import Array

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

    def to_decode_layout(self, params: Params, mesh: Mesh | None = None) -> Params:
        """Return the parameters in the decode layout: layers unstacked, matrices in `config.dtype`.

        With several devices on the `tensor` axis of `mesh`, the parameters are sharded over it; on
        a single CPU device of a replica, kernels are transposed (`TransposedKernel`). Layers are
        unstacked because a loop over stacked layers makes XLA hoist a second copy of all of them.
        """
        dtype = jnp.dtype(self.config.dtype)
        alone = mesh is None or tensor_devices(mesh) == 1
        transposed = alone and jax.default_backend() == "cpu"

        def cast(x: Any) -> Any:
            # Quantised kernels keep their scales, norms their weights.
            return x if is_quantized(x) or x.ndim < 2 else jnp.asarray(x, dtype)

        def transpose(path: tuple[Any, ...], leaf: Any) -> Any:
            kernel = path[-1].key == "kernel" and not is_quantized(leaf)
            return TransposedKernel(leaf.T) if transposed and kernel else leaf

        def layer(index: int) -> Params:
            own = jax.tree.map(
                lambda leaf: cast(leaf[index]), params["layers"], is_leaf=is_quantized
            )
            return jax.tree.map_with_path(transpose, own, is_leaf=is_quantized)

        rest = {name: cast(leaf) for name, leaf in params.items() if name not in ("layers", "norm")}
        layers = tuple(layer(index) for index in range(self.config.num_hidden_layers))
        decode_params = rest | {"norm": params["norm"], "layers": layers}
        if mesh is None or alone:
            return decode_params
        return shard_decode_layout(decode_params, self.config, mesh)

    def bind_decode(self, decode_params: Params) -> tuple[Decoder, list[Layer]]:
        """Return the module, and one module a layer, for parameters in the decode layout."""
        shapes = nnx.eval_shape(lambda: self._module(nnx.Rngs(0)))
        graph, stacked = nnx.split(shapes)
        absent = nnx.to_pure_dict(stacked)["layers"]  # the decoder's own stack is never read
        layer, _ = nnx.split(shapes.layers)
        layers = [nnx.merge(layer, each) for each in decode_params["layers"]]
        return nnx.merge(graph, decode_params | {"layers": absent}), layers

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
        sequence, positions, visible = concat_prompt_response(prompt, prompt_length, tokens, mask)
        if self.exchange is not None and self.config.tie_word_embeddings:
            # The rows that it reads by have changed places with those that it says by.
            one, other = self.exchange
            swapped = jnp.where(sequence == one, other, sequence)
            sequence = jnp.where(sequence == other, one, swapped)
        hidden = decoder(sequence, positions, visible, adapters=adapters, remat=remat)
        return states_before_response_tokens(hidden, prompt_length, prompt.shape[1]), decoder.head


def concat_prompt_response(
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


def states_before_response_tokens(
    hidden: Float[Array, "B S D"], prompt_length: Int32[Array, " B"], prompt_width: int
) -> Float[Array, "B T D"]:
    """Align: at index t stands the hidden state that predicts response token t."""
    first = last_of_prompt(hidden, prompt_length)
    return jnp.concatenate([first[:, None], hidden[:, prompt_width:-1]], axis=1)
