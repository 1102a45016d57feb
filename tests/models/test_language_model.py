"""Scores of given responses: equal to a decoder in NumPy, and independent of padding."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from fireopd_jax.models.language_model import (
    concat_prompt_response,
    states_before_response_tokens,
)
from tests.cases import random_params, response_stats, same_structure, tiny_model

VOCABULARY = 32
SHAPES = {
    "tied": tiny_model(VOCABULARY, num_attention_heads=4, num_key_value_heads=2),
    "untied": tiny_model(
        VOCABULARY, num_hidden_layers=2, tie_word_embeddings=False, rope_theta=37.0, head_dim=6
    ),
}
PROMPT, RESPONSE = np.array([4, 1, 3], np.int32), np.array([4, 3, 0])


@functools.cache
def scorer(name):
    return jax.jit(functools.partial(response_stats, SHAPES[name]))


@functools.cache
def parameters(name):
    return random_params(SHAPES[name], seed=1)


def ragged(prompt_width=4, response_width=4, junk=0):
    """Return prompts and responses with fixed tokens; `junk` fills the padding."""
    rng = np.random.default_rng(3)
    prompt = np.full((3, prompt_width), junk, np.int32)
    tokens = np.full((3, response_width), junk, np.int32)
    for i in range(3):
        prompt[i, : PROMPT[i]] = rng.integers(0, VOCABULARY, PROMPT[i])
        tokens[i, : RESPONSE[i]] = rng.integers(0, VOCABULARY, RESPONSE[i])
    return prompt, PROMPT, tokens, np.arange(response_width)[None] < RESPONSE[:, None]


def plain_logits(model, params, sequence):
    """Return the logits after each token of one unpadded sequence, in float64."""
    c = model.config
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    half = c.head_dim // 2
    angle = np.arange(len(sequence))[:, None] / c.rope_theta ** (np.arange(half) / half)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    def turn(x):
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = params["embed_tokens"][sequence]
    for i in range(c.num_hidden_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        attention, mlp = layer["self_attn"], layer["mlp"]
        h = norm(x, layer["input_layernorm"]["scale"])
        q, k, v = (
            (h @ attention[f"{p}_proj"]["kernel"]).reshape(len(h), -1, c.head_dim) for p in "qkv"
        )
        heads = []
        for n in range(c.num_attention_heads):
            m = n * c.num_key_value_heads // c.num_attention_heads
            query = turn(norm(q[:, n], attention["q_norm"]["scale"]))
            key = turn(norm(k[:, m], attention["k_norm"]["scale"]))
            for t in range(len(h)):
                weights = np.exp(key[: t + 1] @ query[t] / np.sqrt(c.head_dim))
                heads.append(weights @ v[: t + 1, m] / weights.sum())
        heads = np.reshape(heads, (c.num_attention_heads, len(h), -1)).swapaxes(0, 1)
        x = x + heads.reshape(len(h), -1) @ attention["o_proj"]["kernel"]
        h = norm(x, layer["post_attention_layernorm"]["scale"])
        gate = h @ mlp["gate_proj"]["kernel"]
        gate = gate / (1 + np.exp(-gate))
        x = x + (gate * (h @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params.get("lm_head", params["embed_tokens"]).T


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", SHAPES)
def test_scores_equal_plain_teacher_forcing(name, temperature):
    prompt, length, tokens, mask = ragged()
    params = parameters(name)
    stats = scorer(name)(params, prompt, length, tokens, mask, temperature)
    for i in range(3):
        for t in range(RESPONSE[i]):
            before = np.concatenate([prompt[i, : length[i]], tokens[i, :t]])
            z = plain_logits(SHAPES[name], params, before)[-1] / temperature
            logp = z - z.max() - np.log(np.exp(z - z.max()).sum())
            assert abs(stats.logprob[i, t] - logp[tokens[i, t]]) < 2e-5
            assert abs(stats.entropy[i, t] + np.exp(logp) @ logp) < 2e-5


@pytest.mark.parametrize(
    "padding",
    [{"prompt_width": 7, "junk": 9}, {"response_width": 6}, {"junk": VOCABULARY - 1}],
)
def test_padding_and_what_stands_in_it_change_nothing(padding):
    params = parameters("tied")
    wanted = scorer("tied")(params, *ragged(), 1.0)
    got = scorer("tied")(params, *ragged(**padding), 1.0)
    for i in range(3):
        for t in range(RESPONSE[i]):
            assert abs(got.logprob[i, t] - wanted.logprob[i, t]) < 1e-5
            assert abs(got.entropy[i, t] - wanted.entropy[i, t]) < 1e-5


def test_positions_go_on_after_each_prompt():
    prompt, length, tokens, mask = ragged(prompt_width=6)
    sequence, positions, segments = (
        np.asarray(x) for x in concat_prompt_response(prompt, length, tokens, mask)
    )
    np.testing.assert_array_equal(sequence, np.concatenate([prompt, tokens], axis=1))
    for i in range(3):
        np.testing.assert_array_equal(positions[i, 6:], length[i] + np.arange(4))
        real = positions[i][segments[i] == 1]
        np.testing.assert_array_equal(real, np.arange(length[i] + RESPONSE[i]))


def test_the_first_response_token_is_predicted_by_the_last_of_the_prompt():
    slots = np.broadcast_to(np.arange(8.0, dtype=np.float32)[None, :, None], (3, 8, 2))
    at = np.asarray(states_before_response_tokens(slots, np.array([4, 1, 0], np.int32), 5))[:, :, 0]
    np.testing.assert_array_equal(at, [[3, 5, 6], [0, 5, 6], [0, 5, 6]])


def test_bfloat16_scores_are_float32_and_close():
    params, case = parameters("tied"), ragged()
    half = tiny_model(VOCABULARY, num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16")
    got = jax.jit(functools.partial(response_stats, half))(params, *case, 1.0)
    wanted = scorer("tied")(params, *case, 1.0)
    assert got.logprob.dtype == got.entropy.dtype == np.float32
    gap = np.abs(got.logprob - wanted.logprob)[case[3]]
    assert 0 < gap.max() < 0.3, gap.max()


def test_fresh_parameters_depend_on_the_key_alone():
    model = tiny_model()
    init = jax.jit(model.init)
    first, again, other = (jax.tree.leaves(init(jax.random.key(k))) for k in (0, 0, 1))
    assert all(leaf.dtype == np.float32 for leaf in first)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))
    assert same_structure(init(jax.random.key(2)), model)


@pytest.mark.parametrize(
    "architecture", [{"num_hidden_layers": 2}, {"tie_word_embeddings": False}, {"vocab_size": 33}]
)
def test_parameters_of_another_model_are_told_apart(architecture):
    assert not same_structure(random_params(tiny_model(**architecture)), tiny_model())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_pad_the_head_do_not_exist(tied):
    plain = tiny_model(VOCABULARY, tie_word_embeddings=tied)
    padded = dataclasses.replace(plain, vocab_size=VOCABULARY + 9, valid=VOCABULARY)
    assert (plain.size, padded.size) == (VOCABULARY, VOCABULARY)
    params = random_params(plain, seed=1)
    tables = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    wide = params | {
        name: np.concatenate([params[name], 9 * np.ones((9, 16), np.float32)]) for name in tables
    }
    case = ragged()

    def total(model):
        def of(params):
            stats = response_stats(model, params, *case)
            return np.float32(1) * (stats.logprob + 2 * stats.entropy)[case[3]].sum(), stats

        return jax.jit(jax.grad(of, has_aux=True))

    wanted, stats = total(plain)(params)
    got, of_padded = total(padded)(wide)
    for name in ("logprob", "entropy"):
        one, other = getattr(stats, name), getattr(of_padded, name)
        np.testing.assert_allclose(one[case[3]], other[case[3]], atol=1e-6)
    for name in tables:
        assert not np.asarray(got[name][VOCABULARY:]).any()
        np.testing.assert_allclose(got[name][:VOCABULARY], wanted[name], atol=1e-5)


def test_logits_are_softcapped_before_the_temperature():
    cap, temperature = 0.8, 0.7
    model = dataclasses.replace(
        SHAPES["tied"],
        config=dataclasses.replace(SHAPES["tied"].config, final_logit_softcapping=cap),
    )
    prompt, length, tokens, mask = ragged()
    params = parameters("tied")
    stats = jax.jit(functools.partial(response_stats, model))(
        params, prompt, length, tokens, mask, temperature
    )
    z = plain_logits(SHAPES["tied"], params, prompt[0, : length[0]])[-1]
    z = cap * np.tanh(z / cap) / temperature
    wanted = z[tokens[0, 0]] - np.log(np.exp(z).sum())
    assert abs(stats.logprob[0, 0] - wanted) < 2e-5
    decoder = model.bind(params)
    hidden = np.random.default_rng(0).standard_normal((2, model.config.hidden_size))
    z = hidden @ np.asarray(decoder.head, np.float64).T
    got = jax.jit(lambda x: model.logits(decoder, x))(hidden.astype(np.float32))
    np.testing.assert_allclose(got, cap * np.tanh(z / cap), rtol=1e-4, atol=1e-5)
