"""Packed rows give the scores and gradients of padded ones, and cost what their tokens cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import ConfidenceConfusion
from fireopd_jax.method.scoring import SampledToken, TopK, WholeVocabulary
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate, shard_rows
from fireopd_jax.training.update import gradients
from fireopd_jax.types import Prompts, Rollout
from tests import cases

ARCHITECTURE = DecoderConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    sliding_window=16,
    layer_types=("sliding_attention", "full_attention"),
)
ROWS, P, T, TOKENS = 16, 12, 80, 128
MODEL = LanguageModel(ARCHITECTURE, vocab_size=31)
LOSS = SampledReverseKL()


def params_of(seed):
    # Sharper than at initialisation, so that scores and weights differ.
    return jax.tree.map(lambda x: x * 2, MODEL.init(jax.random.key(seed)))


STUDENT, TEACHER, OTHER = (params_of(seed) for seed in range(3))


def make_rollout(lengths=None, seed=0):
    """Return responses of uneven lengths, among them none and the longest, for two teachers."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, T // 2, ROWS) if lengths is None else np.array(lengths)
    if lengths is None:
        length[[3, 5]] = 0, T
    prompt, tokens = (rng.integers(1, 31, (ROWS, n)).astype(np.int32) for n in (P, T))
    prompt_length = rng.integers(1, P + 1, ROWS).astype(np.int32)
    mask, rows = np.arange(T)[None] < length[:, None], np.arange(ROWS, dtype=np.int32)
    zeros, ints = np.zeros(tokens.shape, np.float32), np.zeros_like(tokens)
    prompts = Prompts(prompt, prompt_length, prompt, prompt_length, rows % 2, rows, rows, rows)
    return Rollout(prompts, tokens, mask, zeros, zeros, mask.any(axis=1), ints, ints)


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(stage, teachers, rollout):
    models = [(MODEL, each) for each in (TEACHER, OTHER)[:teachers]]
    return cases.scored(stage, (MODEL, STUDENT), models, rollout, 1.0)


@jax.jit
def assembled(rollout, scores):
    stages = TeacherQuantile(drop_fraction=0.25), ConfidenceConfusion()
    return cases.assembled(rollout, scores, *stages, "seq", 1)[0]


@functools.partial(jax.jit, static_argnames=("micro_batch_tokens", "remat", "loss"))
def gradient_of(batch, micro_batch_tokens=None, remat="none", loss=LOSS):
    found = {"micro_batch_tokens": micro_batch_tokens, "remat": remat}
    return gradients(MODEL, loss, STUDENT, batch, 0.9, **found)


@pytest.fixture(scope="module")
def batch():
    rollout = make_rollout()
    return assembled(rollout, score(SampledToken(), 1, rollout))


def assert_close(one, other, bound=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(b).max() > 0
        assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.parametrize(
    "stage",
    [SampledToken(), TopK(k=5, support="union", sampled=True), WholeVocabulary()],
    ids=lambda stage: stage.kind,
)
@pytest.mark.parametrize("teachers", [1, 2])
def test_packed_scores_are_those_of_padded_rows(stage, teachers):
    rollout = make_rollout()
    packed = dataclasses.replace(stage, micro_batch_tokens=TOKENS)
    ours, theirs = (score(each, teachers, rollout) for each in (packed, stage))
    leaves = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in leaves:
        mask = np.asarray(rollout.mask).reshape(*rollout.mask.shape, *(1,) * (a.ndim - 2))
        a, b = (np.where(mask, x, 0) for x in (a, b))
        if np.issubdtype(a.dtype, np.floating):
            # Of what is minus infinity, too: ids outside of a support.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("tokens", "remat"), [(1, "none"), (256, "full"), (4096, "dots")])
def test_packed_gradients_are_those_of_padded_rows(batch, tokens, remat):
    ours, theirs = gradient_of(batch, tokens, remat), gradient_of(batch)
    assert_close(ours[0], theirs[0])
    for name, metric in theirs[1].items():
        np.testing.assert_allclose(
            ours[1][name].result(), metric.result(), rtol=1e-4, atol=1e-6, err_msg=name
        )


def test_the_order_of_the_rows_changes_nothing(batch):
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: np.asarray(x)[order], batch)
    assert_close(gradient_of(shuffled, TOKENS)[0], gradient_of(batch, TOKENS)[0])


@pytest.mark.parametrize("loss", [SampledReverseKL(gamma=0.9), LOSS], ids=["discount", "plain"])
def test_eight_devices_give_what_one_gives(batch, loss):
    mesh = make_mesh(MeshConfig())

    @jax.jit
    def run(params, batch):
        return gradients(MODEL, loss, params, batch, 0.9, micro_batch_tokens=TOKENS, mesh=mesh)[0]

    ours = run(replicate(mesh, STUDENT), shard_rows(mesh, batch))
    assert_close(ours, gradient_of(batch, loss=loss)[0])


def test_adapters_get_the_gradient_of_padded_rows(batch):
    lora = LoraConfig(rank=2)
    adapters = jax.tree.map(lambda x: x + 0.1, lora.init(jax.random.key(3), STUDENT))

    @functools.partial(jax.jit, static_argnums=0)
    def run(tokens):
        known = {"micro_batch_tokens": tokens, "lora": lora, "base": STUDENT}
        return gradients(MODEL, LOSS, adapters, batch, 0.9, **known)[0]

    # Adapters this close to 0 have small gradients: what is left of larger terms.
    assert_close(run(TOKENS), run(None), bound=1e-4)


def passes(batch):
    return int(gradient_of(batch, TOKENS)[1]["grad_square"].count)


def test_dropped_trajectories_and_padding_cost_nothing(batch):
    lengths = (np.asarray(batch.coefficient) != 0).sum(axis=1)
    there = lengths > 0
    assert 0 < there.sum() < np.asarray(batch.rollout.mask).any(axis=1).sum()
    tokens = (np.asarray(batch.rollout.prompts.length) + lengths - 1)[there].sum()
    assert -(-tokens // TOKENS) <= passes(batch) <= -(-tokens // TOKENS) + 1
    short = dataclasses.replace(batch, coefficient=batch.coefficient * (np.arange(T) < 2)[None])
    assert passes(short) == 1
    nothing = dataclasses.replace(batch, coefficient=batch.coefficient * 0)
    grads, metrics = gradient_of(nothing, TOKENS)
    assert passes(nothing) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))
    assert metrics["loss"].total == 0


def test_lengths_compile_nothing(batch):
    gradient_of(batch, TOKENS)
    before = gradient_of._cache_size()
    for lengths in ([1] * ROWS, [T] * ROWS):
        rollout = make_rollout(lengths)
        gradient_of(assembled(rollout, score(SampledToken(), 1, rollout)), TOKENS)
    assert gradient_of._cache_size() == before


def test_nan_in_a_dropped_row_harms_nobody(batch):
    rows = np.asarray(batch.coefficient).any(axis=1)
    dropped = int(np.flatnonzero(~rows & np.asarray(batch.rollout.mask).any(axis=1))[0])
    teacher = batch.scores.teacher
    spoiled = dataclasses.replace(teacher, logprob=teacher.logprob.at[dropped].set(jnp.nan))
    scores = dataclasses.replace(batch.scores, teacher=spoiled)
    ours = gradient_of(dataclasses.replace(batch, scores=scores), TOKENS)[0]
    assert_close(ours, gradient_of(batch, TOKENS)[0])
