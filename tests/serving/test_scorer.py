"""Scores of sequences: equal to the plain formula in any batch, bucket and mesh."""

import numpy as np
import pytest

from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.serving.scorer import TOGETHER, Scorer, ScoreRequest, at_least, padded
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate
from tests.cases import random_params, tiny_model

MODEL = LanguageModel(tiny_model(40).config, 40, 37)  # three ids are padding
PARAMS = random_params(MODEL)
RNG = np.random.default_rng(0)


def plain(tokens):
    """Return the model's log-probabilities in float64 by the plain formula: [L - 1, V]."""
    tokens = np.asarray(tokens, np.int32)[None]
    mask = np.ones((1, tokens.shape[1] - 1), bool)
    hidden, head = MODEL.response_hidden(
        PARAMS, tokens[:, :1], np.ones(1, np.int32), tokens[:, 1:], mask
    )
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(head, np.float64).T
    logits = logits[:, :37] - logits[:, :37].max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def request(length, k=0, width=0, start=0):
    tokens = RNG.integers(0, 37, length).astype(np.int32)
    support = RNG.integers(-1, 37, (length - 1 - start, width)).astype(np.int32)
    return ScoreRequest(tokens, k, support if width else None, start)


def check(asked, scored):
    logp = plain(asked.tokens)
    rows = np.arange(len(logp))
    np.testing.assert_allclose(scored.logprob, logp[rows, asked.tokens[1:]], atol=1e-5)
    assert scored.logprob.dtype == scored.top_logprob.dtype == np.float32
    best = np.argsort(-logp, axis=1, kind="stable")[:, : asked.k]
    np.testing.assert_array_equal(scored.top_ids, best)
    np.testing.assert_allclose(
        scored.top_logprob, np.take_along_axis(logp, best, axis=1), atol=1e-5
    )
    if asked.support is None:
        assert scored.at_ids is None
        return
    for j, (ids, values) in enumerate(zip(asked.support, scored.at_ids, strict=True)):
        expected = np.where(ids < 0, -np.inf, logp[asked.start + j, ids])
        np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_every_sequence_has_its_own_scores_in_the_order_asked(devices):
    mesh = make_mesh(MeshConfig(data=devices))
    scorer = Scorer(MODEL, replicate(mesh, PARAMS), mesh)
    asked = [request(2 + i, k=1 + i % 3) for i in range(2 * TOGETHER)]
    asked += [request(9, width=3, start=2), request(140, k=2, width=4), request(129), request(130)]
    for one, scored in zip(asked, scorer.score(asked), strict=True):
        check(one, scored)


def test_one_token_has_nothing_to_score_and_no_sequence_no_scores():
    mesh = make_mesh(MeshConfig(data=1))
    scorer = Scorer(MODEL, PARAMS, mesh)
    (alone,) = scorer.score([request(1, k=2)])
    assert alone.logprob.shape == (0,) and alone.top_ids.shape == (0, 2) and alone.finite
    assert scorer.score([]) == [] and not scorer.programs


def test_a_sequence_that_is_not_finite_is_known_as_such_and_spoils_no_other():
    model = tiny_model(40, tie_word_embeddings=False)
    params = random_params(model)
    params |= {"embed_tokens": params["embed_tokens"].at[36].set(np.nan)}
    scorer = Scorer(model, params, make_mesh(MeshConfig(data=1)))
    good = ScoreRequest(np.array([1, 2, 3], np.int32))
    bad = ScoreRequest(np.array([1, 36, 3], np.int32))
    one, other = scorer.score([good, bad])
    assert one.finite and not other.finite


def test_sizes_are_padded_to_powers_of_two():
    assert [at_least(n, 128) for n in (1, 128, 129, 1000)] == [128, 128, 256, 1024]
    assert [padded(n) for n in (0, 1, 2, 3, 128)] == [0, 1, 2, 4, 128]
