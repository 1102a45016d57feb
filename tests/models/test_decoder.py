"""The decoder: attention against plain loops, causality, equal results of all code paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.models.decoder import DecoderConfig, parameter_count
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.ops.attention import attend
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.state import Shape
from tests.cases import random_params, response_stats, through_cache, tiny_model

MODEL = tiny_model(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
)
PARAMS = random_params(MODEL)
ROWS, WIDTH, ROOM = 3, 5, 3
LENGTH = np.array([5, 2, 3], np.int32)


@jax.jit
def whole(params, tokens, positions, visible):
    return MODEL.bind(params)(tokens, positions, visible.astype(np.int32))


def inputs(seed=0):
    """Sequences of WIDTH prompt slots and ROOM response slots, all of these real."""
    tokens = np.random.default_rng(seed).integers(0, 32, (ROWS, WIDTH + ROOM)).astype(np.int32)
    slots = np.arange(WIDTH + ROOM, dtype=np.int32)[None]
    after = slots - WIDTH + LENGTH[:, None]
    positions = np.where(slots < WIDTH, slots, after).astype(np.int32)
    return tokens, positions, (slots < LENGTH[:, None]) | (slots >= WIDTH)


def plain_attention(q, k, v, mask):
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        key, value = k[b, n // group], v[b, n // group]
        seen = np.nonzero(mask[b, t])[0]
        seen = seen if len(seen) else np.arange(len(key))
        scores = key[seen] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ value[seen] / weights.sum()
        if not mask[b, t].any():
            out[b, t, n] = value.mean(0)
    return out


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attention_equals_plain_loops(heads, shared):
    rng = np.random.default_rng(heads + shared)
    q = rng.standard_normal((2, 3, heads, 8)).astype(np.float32)
    k, v = (rng.standard_normal((2, shared, 5, 8)).astype(np.float32) for _ in "kv")
    mask = rng.random((2, 3, 5)) < 0.6
    mask[0, 1] = False  # no visible key: the result is finite, the mean of values
    out = np.asarray(attend(q, k, v, mask))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, plain_attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_a_forbidden_slot_gets_no_weight_however_large_its_score():
    q = np.ones((1, 1, 2, 8), np.float32)
    k, v = np.ones((2, 1, 1, 3, 8), np.float32)
    k[:, :, 2], v[:, :, 2] = 1e4, 1e4
    mask = np.array([[[True, True, False]]])
    np.testing.assert_array_equal(attend(q, k, v, mask), np.ones_like(q))


def test_a_later_token_changes_nothing_before_it():
    tokens, positions, visible = inputs()
    before = whole(PARAMS, tokens, positions, visible)
    for changed in range(WIDTH, WIDTH + ROOM):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % 32
        after = whole(PARAMS, other, positions, visible)
        np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
        assert (np.abs(after[:, changed:] - before[:, changed:]).max(axis=2) > 1e-4).all()


@pytest.mark.parametrize("memory", [Dense(), Paged(page_size=8)], ids=["dense", "paged"])
def test_prefill_and_decode_equal_the_whole_sequence(memory):
    tokens, positions, visible = inputs()
    rows = [tokens[i][visible[i]] for i in range(ROWS)]
    wanted = np.asarray(whole(PARAMS, tokens, positions, visible))
    for i, hidden in enumerate(through_cache(MODEL, PARAMS, rows, LENGTH, memory)):
        np.testing.assert_allclose(hidden, wanted[i][visible[i]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_flows_to_every_parameter(tied):
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=tied)
    params = random_params(model)
    tokens, _, visible = inputs()

    @jax.jit
    @jax.grad
    def gradient(params):
        stats = response_stats(
            model, params, tokens[:, :WIDTH], LENGTH, tokens[:, WIDTH:], visible[:, WIDTH:]
        )
        return stats.logprob.sum() + stats.entropy.sum()

    for path, leaf in jax.tree.leaves_with_path(gradient(params)):
        # The first axis is the layer: each layer must have a gradient.
        for layer in leaf if "layers" in jax.tree_util.keystr(path) else [leaf]:
            assert np.isfinite(layer).all() and np.abs(layer).max() > 1e-6, path


def test_the_head_is_the_embedding_or_its_own():
    tied = tiny_model()
    params = random_params(tied)
    assert "lm_head" not in params
    np.testing.assert_array_equal(tied.bind(params).head, params["embed_tokens"])
    np.testing.assert_array_equal(MODEL.bind(PARAMS).head, PARAMS["lm_head"])
    assert np.abs(PARAMS["lm_head"] - PARAMS["embed_tokens"]).max() > 0.1


def test_the_vocabulary_is_the_size_of_the_tables():
    shapes = jax.eval_shape(tiny_model(vocab_size=41).init, jax.random.key(0))
    assert shapes["embed_tokens"].shape == (41, 16)
    difference = parameter_count(random_params(tiny_model(41))) - parameter_count(
        random_params(tiny_model(40))
    )
    assert difference == 16


def test_bfloat16_stays_close_to_float32():
    tokens, positions, visible = inputs()
    half = LanguageModel(dataclasses.replace(MODEL.config, dtype="bfloat16"), MODEL.vocab_size)
    hidden = jax.jit(lambda p: half.bind(p)(tokens, positions, visible.astype(np.int32)))(PARAMS)
    assert hidden.dtype == jnp.bfloat16 and half.bind(PARAMS).head.dtype == jnp.bfloat16
    cache = Dense().init(half.config, Shape(1, 1, 8, 8, 8))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    exact = np.asarray(whole(PARAMS, tokens, positions, visible))
    gap = np.abs(np.asarray(hidden, np.float32) - exact)[visible]
    assert 0 < gap.max() < 0.15, gap.max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "3 does not divide 4"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 0}, "greater than 0"),
        ({"rope_theta": 0}, "greater than 0"),
        ({"dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"num_layers": 2}, "num_layers"),
    ],
)
def test_impossible_architectures_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**settings)
