"""Supervised training is the same update on given responses."""

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.method.losses.supervised import NegativeLogLikelihood
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.training.sft import supervised_batch
from fireopd_jax.training.update import gradients
from fireopd_jax.types import Prompts
from tests.cases import response_stats

ARCHITECTURE = DecoderConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    head_dim=8, intermediate_size=8,
)  # fmt: skip
LENGTHS = np.array([3, 0, 5, 1], np.int32)


def make_prompts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 11, (4, 3)).astype(np.int32)
    length = np.array([3, 1, 2, 3], np.int32)
    rows = np.arange(4, dtype=np.int32)
    return Prompts(
        tokens, length, tokens, length, np.zeros_like(rows), rows, rows, rows,
        reference=rng.integers(1, 11, (4, 5)).astype(np.int32), reference_length=LENGTHS,
    )  # fmt: skip


def test_every_reference_token_has_the_same_share():
    batch = supervised_batch(make_prompts())
    mask = np.arange(5)[None] < LENGTHS[:, None]
    np.testing.assert_array_equal(batch.rollout.mask, mask)
    np.testing.assert_allclose(batch.coefficient, mask / 9, rtol=1e-6)
    np.testing.assert_array_equal(batch.weight, mask)
    np.testing.assert_array_equal(batch.rollout.finished, LENGTHS > 0)


def test_the_loss_is_the_mean_negative_log_likelihood():
    model = LanguageModel(ARCHITECTURE, vocab_size=11)
    params = model.init(jax.random.key(0))
    prompts = make_prompts()

    @jax.jit
    def run(params, prompts):
        batch = supervised_batch(prompts)
        metrics = gradients(model, NegativeLogLikelihood(), params, batch)[1]
        stats = response_stats(
            model, params, prompts.tokens, prompts.length, batch.rollout.tokens, batch.rollout.mask
        )
        return metrics["loss"].total, jnp.where(batch.rollout.mask, stats.logprob, 0)

    loss, logprob = run(params, prompts)
    np.testing.assert_allclose(loss, -np.asarray(logprob, np.float64).sum() / 9, rtol=1e-5)
