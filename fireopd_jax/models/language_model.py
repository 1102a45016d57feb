"""A decoder as pure functions of its parameters, and the alignment of tokens and predictions.

    params, prompts, responses -> hidden states that predict each response token, head matrix

A sequence is [prompt padded to P | response padded to T]. Positions count real tokens only, and
padding is masked. The hidden state of the prompt's last token predicts response token 0; that of
response token t - 1 predicts response token t.
"""

import dataclasses
import functools
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
from fireopd_jax.models.shares import head_in_parts
from fireopd_jax.ops.dispatch import PLAIN
from fireopd_jax.ops.few_rows import few_rows_product
from fireopd_jax.ops.head import HeadOptions
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.runtime.target import platform
from fireopd_jax.sharding.mesh import REPLICAS
from fireopd_jax.types import Array

Params = dict[str, Any]
"""Nested dict of arrays."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What is static about a model: no parameters, no devices; hashable, for jitted functions."""

    config: DecoderConfig
    vocab_size: int
    """Rows of the embedding and of the head, padding included."""
    valid: int | None = None
    """Size of the vocabulary without padding: ids from `valid` on have probability 0. None: no
    padding."""
    quantize: Quantize | None = None
    """Storage of the kernels of a frozen model; None: `config.param_dtype`."""
    exchange: tuple[int, int] | None = None
    """Two token ids whose output probabilities are swapped: the EOS ids of this teacher and of a
    student that ends its responses with another token. The parameters must be those that
    `exchanged` returns."""

    @property
    def size(self) -> int:
        """Size of the vocabulary without padding."""
        return self.vocab_size if self.valid is None else self.valid

    def _module(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(self.config, self.vocab_size, rngs=rngs)

    def init(self, key: Array) -> Params:
        """Return random parameters; `quantize` applies."""
        module = self._module(nnx.Rngs(jnp.asarray(key)))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return params if self.quantize is None else quantize_params(params)

    def shapes(self) -> Params:
        """Return shapes and dtypes of the parameters; nothing is allocated."""
        return jax.tree.map(lambda leaf: leaf, _shapes(self))  # a tree of the caller's own

    def exchanged(self, params: Params) -> Params:
        """Return the parameters with the head's rows of the two `exchange` ids swapped.

        All other arrays are shared with `params`. Without `exchange`, this is `params` itself.
        """
        if self.exchange is None:
            return params
        name = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        one, other = self.exchange
        rows, places = params[name][jnp.array([other, one])], jnp.array([one, other])
        return params | {name: params[name].at[places].set(rows)}

    def bind(self, params: Params) -> Decoder:
        """Return the decoder module with these parameters."""
        return nnx.merge(_structure(self).decoder, params)

    def to_decode_layout(self, params: Params, mesh: Mesh | None = None) -> Params:
        """Return the parameters in the decode layout: layers unstacked, matrices in `config.dtype`.

        With several devices on the `tensor` axis of `mesh`, the parameters are sharded over it; on
        a single CPU device of a replica, kernels are transposed (`TransposedKernel`). Layers are
        unstacked because a loop over stacked layers makes XLA hoist a second copy of all of them.
        """
        dtype = jnp.dtype(self.config.dtype)
        alone = mesh is None or tensor_devices(mesh) == 1
        transposed = alone and platform() == "cpu"

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
        structure = _structure(self)
        layers = [nnx.merge(structure.layer, each) for each in decode_params["layers"]]
        stack = {"layers": structure.stack}  # the decoder's own, never read
        return nnx.merge(structure.decoder, decode_params | stack), layers

    def logits(self, decoder: Decoder, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Return the logits of one position of each row, float32, softcapped: the sampler's input.

        Padding ids have -inf. They are not cut off, because the sampler would have to pad the
        vocabulary axis again.
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
        """Return the options of `ops.head` for this model at a temperature.

        `implementation` and `chunk` None: chosen by platform and shape. With a mesh of several
        devices, rows are sharded over all of them; the devices of `tensor` share their tokens, and
        each has a part of the vocabulary. Not so the reference implementation.
        """
        sharding = None
        if mesh is not None and mesh.size > 1 and implementation != PLAIN:
            columns = "tensor" if tensor_devices(mesh) > 1 else None
            sharding = HeadSharding(mesh, REPLICAS, columns, width="fsdp", own_tokens=True)
        return {
            "logit_scale": 1.0 / temperature,
            "softcap": self.config.final_logit_softcapping,
            "valid": self.size if self.vocab_size % tensor_devices(mesh) else self.valid,
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
        attention: str | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"]]:
        """Return the hidden states that predict each response token, and the head matrix.

        `prompt` is right-padded with lengths `prompt_length`; `mask` is true on real response
        tokens. States where `mask` is false are arbitrary. Differentiable in `params` and in
        `adapters`, which must be scaled (`LoraConfig.scaled`). `attention` names an implementation
        (`ops.attention`); `mesh` has the devices that the rows are sharded over.
        """
        hidden, head = self.hidden(
            params,
            *concat_prompt_response(prompt, prompt_length, tokens, mask),
            adapters=adapters,
            remat=remat,
            attention=attention,
            mesh=mesh,
        )
        return states_before_response_tokens(hidden, prompt_length, prompt.shape[1]), head

    @functools.partial(
        jax.jit, static_argnums=0, static_argnames=("remat", "attention", "mesh"), inline=True
    )
    def hidden(
        self,
        params: Params,
        tokens: Int32[Array, "B S"],
        positions: Int32[Array, "B S"],
        segments: Int32[Array, "B S"],
        *,
        adapters: Adapters | None = None,
        remat: Remat = "none",
        attention: str | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
        """Return the final hidden states of whole sequences, and the head matrix.

        A token attends to the tokens before it that have the same value, not 0, in `segments`. The
        head has rows of zeros at its end where the devices of `tensor` do not divide it.
        """
        decoder = self.bind(params)
        if self.exchange is not None and self.config.tie_word_embeddings:
            # `exchanged` has swapped two rows of the one matrix that also embeds the inputs, so
            # the inputs swap the two ids back.
            one, other = self.exchange
            swapped = jnp.where(tokens == one, other, tokens)
            tokens = jnp.where(tokens == other, one, swapped)
        hidden = decoder(
            tokens,
            positions,
            segments,
            adapters=adapters,
            remat=remat,
            attention=attention,
            mesh=mesh,
        )
        return hidden, head_in_parts(decoder.head, mesh)

    def head(self, params: Params, mesh: Mesh | None = None) -> Float[Array, "V D"]:
        """Return the head matrix, as `hidden` does."""
        return head_in_parts(self.bind(params).head, mesh)


@functools.lru_cache(maxsize=32)
def _shapes(model: LanguageModel) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class _Structure:
    """The modules of a model without their parameters."""

    decoder: Any
    layer: Any
    stack: Params
    """Shapes of the stacked layers."""


@functools.lru_cache(maxsize=32)
def _structure(model: LanguageModel) -> _Structure:
    """Return a model's modules, which take a third of the time that tracing it takes."""
    shapes = nnx.eval_shape(lambda: model._module(nnx.Rngs(0)))
    decoder, stacked = nnx.split(shapes)
    layer, _ = nnx.split(shapes.layers)
    return _Structure(decoder, layer, nnx.to_pure_dict(stacked)["layers"])


def concat_prompt_response(
    prompt: Int32[Array, "B P"],
    prompt_length: Int32[Array, " B"],
    tokens: Int32[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> tuple[Int32[Array, "B S"], Int32[Array, "B S"], Int32[Array, "B S"]]:
    """Return token ids, positions and segments of [prompt | response], S = P + T.

    Segments are 1 on tokens and 0 on padding.
    """
    (rows, width), response = prompt.shape, tokens.shape[1]
    slots = jnp.broadcast_to(jnp.arange(width), (rows, width))
    after = prompt_length[:, None] + jnp.arange(response)[None]
    sequence = jnp.concatenate([prompt, tokens], axis=1)
    positions = jnp.concatenate([slots, after], axis=1)
    visible = jnp.concatenate([slots < prompt_length[:, None], mask], axis=1)
    return sequence, positions, visible.astype(jnp.int32)


def last_of_prompt(
    hidden: Float[Array, "B S D"], prompt_length: Int32[Array, " B"]
) -> Float[Array, "B D"]:
    """Return the hidden state of each prompt's last token; of column 0 if the prompt is empty."""
    last = jnp.maximum(prompt_length - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def states_before_response_tokens(
    hidden: Float[Array, "B S D"], prompt_length: Int32[Array, " B"], prompt_width: int
) -> Float[Array, "B T D"]:
    """Return at index t the state of the token before response token t: it predicts token t."""
    first = last_of_prompt(hidden, prompt_length)
    return jnp.concatenate([first[:, None], hidden[:, prompt_width:-1]], axis=1)
