"""A teacher with another EOS id than its student: the two ids' output rows are swapped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import random_params, response_stats, tiny_model

OURS, ITS = 5, 9


@pytest.mark.parametrize("tied", [True, False])
def test_two_words_change_places_in_what_is_said_and_in_nothing_else(tied):
    model = tiny_model(num_hidden_layers=2, tie_word_embeddings=tied)
    params = random_params(model)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 32, (6, 4)).astype(np.int32)
    prompt[:3, 1], prompt[3:, 2] = OURS, ITS  # Prompts contain both ids, too.
    length = np.full(6, 4, np.int32)
    tokens = rng.integers(10, 32, (6, 5)).astype(np.int32)
    tokens[:, 2] = ITS  # So does the middle of a response.
    tokens[:, 4] = OURS
    mask = np.ones((6, 5), bool)

    def ask(model, params, tokens):
        return response_stats(model, params, prompt, length, tokens, mask)

    other = dataclasses.replace(model, exchange=(OURS, ITS))
    moved = jax.jit(other.exchanged)(params)
    got = ask(other, moved, tokens)
    ended = tokens.copy()
    ended[:, 4], ended[:, 2] = ITS, ITS
    wanted = ask(model, params, ended)
    # In the middle of the response, the teacher's EOS id has the probability of the student's.
    hidden, head = model.response_hidden(params, prompt, length, tokens, mask)
    logp = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head))
    expected = np.array(wanted.logprob)
    expected[:, 2] = logp[:, 2, OURS]
    np.testing.assert_allclose(got.logprob, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.entropy, wanted.entropy, rtol=1e-4, atol=1e-5)
    kept = [name for name in params if name != ("embed_tokens" if tied else "lm_head")]
    assert all(moved[name] is not None for name in kept)
    assert model.exchanged(params) is params
