"""What a step cannot do without: its matrix products alone, counted and timed.

    lengths of the rows       -> Work -> FLOPs of a model's products
    Work, the model's weights -> the same products and nothing else, compiled -> seconds

Only real tokens count: no padding, no dropped rows, and of attention the pairs that causality
allows. Norms, RoPE, softmax, sampling and the optimizer are left out. Products in float32 have full
float32 precision, as the model's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fireopd_jax.bench.head import Case, compile_case
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.layers import TransposedKernel
from fireopd_jax.models.work import Work
from fireopd_jax.ops.few_rows import few_rows_product
from fireopd_jax.ops.precision import precision_of
from fireopd_jax.runtime.topologies import chip_of
from fireopd_jax.types import Array

PASS_TOKENS = 2048
"""Tokens of a timed pass, about; the time of more is proportional."""
DECODE_STEPS = 16
"""Decoding steps that are timed; the time of more is proportional."""
SQUARE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
"""Width of the square matrices whose product measures the speed of the device."""


@dataclasses.dataclass(frozen=True)
class Floor:
    """Compiled products, and the work of a stage as a multiple of theirs."""

    case: Case
    scale: float


def measured_peak(dtype: str) -> tuple[Case, int]:
    """Return the product of two square matrices in the dtype, and its FLOPs."""
    size = SQUARE.get(jax.default_backend(), 1024)
    x = _random(0, (size, size), dtype)
    return compile_case(lambda x, y: _dot(x, y), (x, x + 1)), 2 * size**3


def known_peak(dtype: str) -> float | None:
    """Return the published FLOPs per second of this device, None where they are not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops if chip is not None and dtype == "bfloat16" else None


def pass_floor(model: LanguageModel, params: Params, work: Work, *, backward: bool) -> Floor:
    """Return the products of a pass over rows of one length, with as many pairs a token as `work`.

    With `backward`, also those of the gradient to all weights and to the embedded tokens.
    """
    c = model.config
    length = max(2, 2 * round(work.pairs / work.tokens))
    rows = max(1, round(min(work.tokens, PASS_TOKENS) / length))
    scale = work.tokens / (rows * length)
    predicted = min(rows * length, max(1, round(work.predicted / scale)))
    x = _random(1, (rows, length, c.hidden_size), c.dtype)
    weights = {"layers": params["layers"], "head": _head(model, params)}

    def forward(x: Array, weights: Params) -> tuple[Array, Array]:
        layers = jax.tree.map(lambda leaf: leaf.astype(c.dtype), weights["layers"])
        states = jnp.zeros((rows * length, c.hidden_size), c.dtype)
        for index in range(c.num_hidden_layers):
            # Each layer has the same input, so that no value grows from layer to layer.
            own = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
            states += _layer(c, own, x)
        head = weights["head"].astype(c.dtype)
        return states, _dot(states[:predicted], head.T)

    def loss(x: Array, weights: Params) -> Array:
        _, logits = forward(x, weights)
        return 0.5 * jnp.sum(logits.astype(jnp.float32) ** 2)

    program = jax.grad(loss, argnums=(0, 1)) if backward else forward
    return Floor(compile_case(program, (x, weights)), scale)


def decode_floor(
    model: LanguageModel, params: Params, work: Work, response: np.ndarray, slots: int
) -> Floor | None:
    """Return the products of decoding steps with as many rows as the mean step has.

    A rollout takes as many steps as its longest response, or as fill all slots. None where no
    response has a second token.
    """
    if work.tokens == 0:
        return None
    c = model.config
    steps = max(int(response.max()) - 1, -(-work.tokens // slots))
    rows, timed = max(1, round(work.tokens / steps)), min(steps, DECODE_STEPS)
    seen = max(1, round(work.pairs / work.tokens))
    weights = jax.jit(model.to_decode_layout)(params)
    x = _random(1, (rows, c.hidden_size), c.dtype)
    cached, layers = (rows, c.num_key_value_heads, seen, c.head_dim), range(c.num_hidden_layers)
    # Keys transposed, and one array a layer: what a CPU multiplies fastest.
    keys = [_random(index, cached, c.dtype).swapaxes(2, 3) for index in layers]
    values = [_random(1000 + index, cached, c.dtype) for index in layers]

    def decode(x: Array, weights: Params, keys: list[Array], values: list[Array]) -> Array:
        def step(_: Array, carry: Array) -> Array:
            states = jnp.zeros_like(x)
            for index, own in enumerate(weights["layers"]):
                states += _decode_layer(c, own, carry, keys[index], values[index])
            logits = few_rows_product(states, _head(model, weights), jnp.float32)
            # A step depends on the one before, as sampling makes it.
            return x + (1e-6 * logits.max(axis=1, keepdims=True)).astype(x.dtype)

        return lax.fori_loop(0, timed, step, x)

    case = compile_case(decode, (x, weights, keys, values))
    return Floor(case, work.tokens / (rows * timed))


def _layer(c: DecoderConfig, own: Params, x: Array) -> Array:
    """Return the products of a layer over rows [R, n, D]; each token attends to n / 2 keys."""
    (rows, length, _), kernels = x.shape, own["self_attn"]
    groups = c.num_attention_heads // c.num_key_value_heads
    x = x.reshape(rows * length, -1)
    q = _dot(x, kernels["q_proj"]["kernel"])
    q = q.reshape(rows, length, c.num_key_value_heads, groups, c.head_dim)
    k, v = (
        _halved(_dot(x, kernels[name]["kernel"]), rows, c.num_key_value_heads, c.head_dim)
        for name in ("k_proj", "v_proj")
    )
    scores = _einsum("rnkgh,rmkh->rkgnm", q, k) / (c.head_dim * length)
    out = _einsum("rkgnm,rmkh->rnkgh", scores, v).reshape(rows * length, -1)
    return _mlp(own, _dot(out, kernels["o_proj"]["kernel"]), _dot)


def _halved(x: Array, rows: int, heads: int, width: int) -> Array:
    """Return the keys of both halves of each row added: half as many, and none is left out."""
    return x.reshape(rows, 2, -1, heads, width).sum(axis=1)


def _decode_layer(c: DecoderConfig, own: Params, x: Array, keys: Array, values: Array) -> Array:
    """Return the products of a layer for one token [M, D] of each row, after cached ones."""
    kernels, heads = own["self_attn"], c.num_key_value_heads
    q, k, v = (
        _project(x, kernels[name]["kernel"]).reshape(len(x), heads, -1, c.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    scores = _einsum("mkgh,mkhs->mkgs", q + k, keys) / (c.head_dim * keys.shape[3])
    out = _einsum("mkgs,mksh->mkgh", scores, values) + v
    return _mlp(own, _project(out.reshape(len(x), -1), kernels["o_proj"]["kernel"]), _project)


def _mlp(own: Params, x: Array, product: Callable[[Array, Any], Array]) -> Array:
    gate, up, down = (own["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
    return product(product(x, gate) * product(x, up), down)


def _project(x: Array, kernel: Any) -> Array:
    """Return the product with a kernel of the decode layout."""
    if isinstance(kernel, TransposedKernel):
        return few_rows_product(x, kernel.rows)
    return _dot(x, kernel)


def _head(model: LanguageModel, params: Params) -> Array:
    return params["embed_tokens" if model.config.tie_word_embeddings else "lm_head"]


def _dot(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, precision=precision_of(x.dtype))


def _einsum(form: str, x: Array, y: Array) -> Array:
    return jnp.einsum(form, x, y, precision=precision_of(x.dtype))


def _random(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)
