"""Int8 kernels: the oracle's integers, small errors of log-probabilities, fewer bytes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import int8

from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.models.quantized import (
    dequantize,
    is_quantized,
    quantizable,
    quantize,
    quantize_params,
    quantize_rows,
)
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling
from tests.cases import make_prompts, random_params, response_stats, same_structure, tiny_model

FAMILIES = {
    "qwen3": {},
    "qwen3_moe": {"moe": MoEConfig(num_experts=5, moe_intermediate_size=12)},
    "qwen2": {"qk_norm": False, "attention_bias": True, "tie_word_embeddings": False},
    "llama": {"qk_norm": False, "mlp_bias": True, "attention_output_bias": True},
    "mistral": {"qk_norm": False, "sliding_window": 4},
    "gemma3_text": {
        "zero_centered_norms": True, "post_norms": True, "scale_embeddings": True,
        "final_logit_softcapping": 3.0, "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4,
        "layer_types": ("sliding_attention", "full_attention"), "rope_local_theta": 100.0,
    },
}  # fmt: skip
# In nats, for widely spread random logits: twice the measured errors.
MEAN, MAX = 0.06, 0.3


def model(family, **more):
    return tiny_model(num_hidden_layers=2, model_type=family, **FAMILIES[family], **more)


def logprobs(model, params):
    prompts = make_prompts([3, 5, 1, 4], 5)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 32, (4, 8)).astype(np.int32)
    mask = np.arange(8)[None] < np.array([8, 5, 8, 2])[:, None]
    stats = jax.jit(functools.partial(response_stats, model))(
        params, prompts.tokens, prompts.length, tokens, mask
    )
    return np.asarray(stats.logprob, np.float64)[mask]


def whole(params):
    return jax.tree.map(
        lambda leaf: dequantize(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_numbers_and_steps_are_the_oracles(dtype):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 40, 7)) * 10.0 ** rng.integers(-3, 3, 7), dtype)
    kernel = kernel.at[1, :, 2].set(0)  # a column of zeros
    got = jax.jit(quantize)(kernel)
    assert got.scale.shape == (3, 1, 7) and got.scale.dtype == jnp.float32
    for layer in range(3):
        values, steps = int8(kernel[layer])
        np.testing.assert_allclose(got.scale[layer, 0], steps, rtol=1e-6)
        # A weight half-way between two integers may round either way in float32.
        assert np.abs(values - got.values[layer]).max() <= 1
        assert (values != got.values[layer]).mean() < 0.02
        wide = np.asarray(kernel[layer], np.float64)
        error = np.abs(np.asarray(dequantize(got)[layer], np.float64) - wide)
        assert (error <= steps[None] * 0.5001).all()
        assert np.abs(np.asarray(got.values[layer], np.int32)).max() == 127
        assert not np.asarray(dequantize(got)[1, :, 2]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_host_comes_to_the_same_bits(dtype):
    # Many bfloat16 weights are half-way between two integers.
    kernel = np.random.default_rng(1).standard_normal((300, 200)).astype(dtype)
    kernel = kernel.astype(np.float32)
    kernel[:, 3] = 0
    values, steps = quantize_rows(kernel.T)
    got = jax.jit(quantize)(kernel)
    np.testing.assert_array_equal(values.T, got.values)
    np.testing.assert_array_equal(steps.T, got.scale)


def test_what_is_not_finite_stays_visible():
    kernel = np.ones((4, 3), np.float32)
    kernel[1, 0], kernel[2, 1] = np.nan, np.inf
    for scale in (quantize(kernel).scale[0], quantize_rows(kernel.T)[1][:, 0]):
        np.testing.assert_array_equal(np.isfinite(scale), [False, False, True])


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_rounded_weights_and_near_the_others(family):
    exact = model(family)
    params = random_params(exact)
    small = jax.jit(quantize_params)(params)
    got = logprobs(exact, small)
    np.testing.assert_allclose(got, logprobs(exact, whole(small)), rtol=2e-5, atol=2e-5)
    error = np.abs(got - logprobs(exact, params))
    assert 0 < error.mean() < MEAN and error.max() < MAX


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_in_bfloat16_rounding_adds_little_to_that_of_the_type(family):
    exact = model(family)
    half = dataclasses.replace(exact, config=dataclasses.replace(exact.config, dtype="bfloat16"))
    small = jax.jit(quantize_params)(random_params(exact))
    truth = logprobs(exact, whole(small))
    ours = np.abs(logprobs(half, small) - truth).mean()
    plain = np.abs(logprobs(half, whole(small)) - truth).mean()
    assert ours < 1.5 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_take_a_quarter_and_nothing_else_changes(family):
    exact = model(family, hidden_size=64, intermediate_size=192)
    frozen = dataclasses.replace(exact, quantize="int8")
    key = jax.random.key(0)
    params, small = jax.eval_shape(exact.init, key), jax.eval_shape(frozen.init, key)
    assert same_structure(small, frozen) and not same_structure(small, exact)
    assert parameter_count(small) == parameter_count(params)
    kernels = bytes_before = bytes_after = 0
    leaves = jax.tree.leaves(small, is_leaf=is_quantized)
    for (path, before), after in zip(jax.tree.leaves_with_path(params), leaves, strict=True):
        if is_quantized(after):
            kernels += 1
            bytes_before += 4 * before.size
            bytes_after += after.values.size + 4 * after.scale.size
        else:
            assert before.ndim < 3 or "gate" in jax.tree_util.keystr(path), path
            assert before == after
    assert kernels == 7
    assert bytes_after < 0.3 * bytes_before  # Scales are a smaller part of wider kernels.


def test_routers_embeddings_heads_norms_and_biases_are_left():
    left = [
        ("embed_tokens",), ("lm_head",), ("norm", "scale"), ("layers", "mlp", "gate", "kernel"),
        ("layers", "self_attn", "q_proj", "bias"), ("layers", "self_attn", "q_norm", "scale"),
    ]  # fmt: skip
    assert not any(map(quantizable, left))
    assert quantizable(("layers", "mlp", "experts", "down_proj"))
    assert quantizable(("layers", "self_attn", "o_proj", "kernel"))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_it_answers_as_it_scores(family):
    frozen = model(family)
    params = jax.jit(quantize_params)(random_params(frozen))
    prompts = make_prompts([3, 5, 1, 4], 5)
    sampling = Sampling.of((31,), 8, 0, temperature=1.0, top_p=1.0)
    draw = jax.jit(lambda *a: generate(frozen, *a, jnp.int32(0), max_tokens=8))
    rollout = draw(params, prompts, sampling)
    stats = jax.jit(functools.partial(response_stats, frozen))(
        params, prompts.tokens, prompts.length, rollout.tokens, rollout.mask
    )
    real = np.asarray(rollout.mask)
    np.testing.assert_allclose(
        np.asarray(rollout.logprob)[real], np.asarray(stats.logprob)[real], rtol=1e-4, atol=1e-4
    )


def test_a_scan_over_layers_keeps_no_second_copy_of_the_weights():
    deep = tiny_model(num_hidden_layers=12, hidden_size=64, intermediate_size=256)
    small = jax.eval_shape(dataclasses.replace(deep, quantize="int8").init, jax.random.key(0))
    rows = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    length = jax.ShapeDtypeStruct((2,), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 4), jnp.bool_)
    lowered = jax.jit(functools.partial(response_stats, deep)).lower(
        small, rows, length, rows, mask
    )
    memory = lowered.compile().memory_analysis()
    float_copy = 4 * parameter_count(small)
    assert memory.temp_size_in_bytes < float_copy / 4
