"""Several layer types: windows count tokens, not columns, and all code paths agree."""

import jax
import numpy as np
import pytest

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.rope import LinearRope
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from tests.cases import random_params, through_cache, tiny_model

FULL, SLIDING = "full_attention", "sliding_attention"
ROWS, WIDTH, ROOM = 3, 5, 4
LENGTH = np.array([5, 2, 3], np.int32)
MODELS = {
    "all": tiny_model(num_hidden_layers=2, sliding_window=3),
    "mixed": tiny_model(
        num_hidden_layers=3, sliding_window=2, layer_types=(SLIDING, FULL, SLIDING)
    ),
    "bases": tiny_model(
        num_hidden_layers=3, sliding_window=2, layer_types=(SLIDING, SLIDING, FULL),
        rope_local_theta=20.0, rope_scaling=LinearRope(factor=4.0), query_pre_attn_scalar=3.0,
        post_norms=True, zero_centered_norms=True, scale_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
    ),
}  # fmt: skip


def inputs():
    tokens = np.random.default_rng(0).integers(0, 32, (ROWS, WIDTH + ROOM)).astype(np.int32)
    slots = np.arange(WIDTH + ROOM, dtype=np.int32)[None]
    positions = np.where(slots < WIDTH, slots, slots - WIDTH + LENGTH[:, None]).astype(np.int32)
    return tokens, positions, (slots < LENGTH[:, None]) | (slots >= WIDTH)


def whole(model, params, tokens, positions, visible):
    return np.asarray(
        jax.jit(lambda p: model.bind(p)(tokens, positions, visible.astype(np.int32)))(params)
    )


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_the_whole_and_the_row_alone(name):
    model = MODELS[name]
    params = random_params(model)
    tokens, positions, visible = inputs()

    got = whole(model, params, tokens, positions, visible)
    rows = [tokens[i][visible[i]] for i in range(ROWS)]
    for memory in (Dense(), Paged(page_size=8)):
        for i, hidden in enumerate(through_cache(model, params, rows, LENGTH, memory)):
            np.testing.assert_allclose(hidden, got[i][visible[i]], rtol=1e-5, atol=1e-5)
    # A row without its padding: the window must not count padding.
    for i in range(ROWS):
        own = tokens[i][visible[i]][None]
        n = own.shape[1]
        alone = whole(model, params, own, np.arange(n, dtype=np.int32)[None], np.ones((1, n), bool))
        np.testing.assert_allclose(got[i][visible[i]], alone[0], rtol=1e-5, atol=1e-5)


def test_one_layer_sees_its_window_and_no_further():
    model = tiny_model(sliding_window=3)
    params = random_params(model)
    tokens = np.arange(8, dtype=np.int32)[None]
    positions, visible = np.arange(8, dtype=np.int32)[None], np.ones((1, 8), bool)
    before = whole(model, params, tokens, positions, visible)
    other = tokens.copy()
    other[0, 2] = 30
    after = whole(model, params, other, positions, visible)
    changed = np.abs(after - before).max(axis=2)[0] > 1e-5
    np.testing.assert_array_equal(np.flatnonzero(changed), [2, 3, 4])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": (FULL,)}, "layer_types names 1 layers, num_hidden_layers is 3"),
        ({"layer_types": (SLIDING,) * 3}, "if and only if sliding_window is given"),
        ({"layer_types": (FULL,) * 3, "sliding_window": 2}, "if and only if"),
        ({"rope_local_theta": 3.0}, "rope_local_theta has no effect without sliding_window"),
    ],
)
def test_windows_that_no_layer_has_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**fields)
