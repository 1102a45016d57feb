"""The optimizer step: any split gives the same gradient; a non-finite one changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fireopd_jax.method.filtering import KeepAll, TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import ConfidenceConfusion, Uniform
from fireopd_jax.method.scoring import SampledToken
from fireopd_jax.metrics import results
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate, shard_rows
from fireopd_jax.training.optimizer import learning_rate, make_optimizer
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import gradients, make_update, skip_reason
from fireopd_jax.types import Prompts, Rollout, Scores
from tests import cases
from tests.cases import response_stats

ARCHITECTURE = DecoderConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
)
MODEL = LanguageModel(ARCHITECTURE, vocab_size=19)
OPTIM = OptimConfig(learning_rate=1e-2)
LOSS = SampledReverseKL()
FIRE = TeacherQuantile(drop_fraction=0.25), ConfidenceConfusion()
ROWS, P, T = 8, 4, 6


def params_of(seed):
    params = MODEL.init(jax.random.key(seed))
    # Sharper than at initialisation, so that scores and weights differ.
    return jax.tree.map(lambda x: x * 2, params)


STUDENT, TEACHER = params_of(0), params_of(1)


def make_rollout(extra_prompt=0, extra_response=0):
    """Return responses that any model could have drawn; row 5 is empty."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 19, (ROWS, P)).astype(np.int32)
    prompt_length = rng.integers(1, P + 1, ROWS).astype(np.int32)
    tokens = rng.integers(1, 19, (ROWS, T)).astype(np.int32)
    length = rng.integers(2, T + 1, ROWS)
    length[5] = 0
    mask = np.arange(T)[None] < length[:, None]
    prompt, tokens, mask = (
        np.pad(x, ((0, 0), (0, n)))
        for x, n in ((prompt, extra_prompt), (tokens, extra_response), (mask, extra_response))
    )
    rows = np.arange(ROWS, dtype=np.int32)
    zeros = np.zeros(tokens.shape, np.float32)
    return Rollout(
        prompts=Prompts(
            prompt, prompt_length, prompt, prompt_length, np.zeros_like(rows), rows, rows, rows
        ),
        tokens=tokens,
        mask=mask,
        logprob=zeros,
        model_logprob=zeros,
        finished=mask.any(axis=1),
        version=np.zeros_like(tokens),
        writer=np.zeros_like(tokens),
    )


@jax.jit
def score(rollout):
    return cases.scored(SampledToken(), (MODEL, STUDENT), [(MODEL, TEACHER)], rollout, 1.0)


@functools.partial(jax.jit, static_argnames="micro_batch_size")
def gradient_of(batch, temperature=1.0, micro_batch_size=None):
    return gradients(MODEL, LOSS, STUDENT, batch, temperature, micro_batch_size=micro_batch_size)


@functools.cache
def jitted_update(optim, clip=0.2, micro_batch_size=None):
    optimizer = make_optimizer(optim, 10)
    loss = SampledReverseKL(clip=clip)
    return jax.jit(make_update(MODEL, loss, optimizer, micro_batch_size=micro_batch_size))


def make_batch(rollout=None, scores=None, stages=FIRE):
    rollout = make_rollout() if rollout is None else rollout
    scores = score(rollout) if scores is None else scores
    return jax.jit(lambda r, s: cases.assembled(r, s, *stages, "seq", 1))(rollout, scores)


def with_teacher_logprob(scores, row, value):
    teacher = scores.teacher
    spoiled = teacher.logprob.at[row].set(value)
    return Scores(scores.student, dataclasses.replace(teacher, logprob=spoiled))


def assert_close(one, other):
    """Compare gradients leaf by leaf, relative to the leaf's largest element."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(b).max() > 0
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def whole():
    batch, keep = make_batch()
    assert 0 < keep.sum() < ROWS - 1
    return gradient_of(batch)


def step(state, batch, optim=OPTIM, **kwargs):
    update = jitted_update(optim, **kwargs)
    state, metrics = update(state, batch, jnp.float32(1))
    return state, results(metrics)


def fresh(optim=OPTIM):
    return init_state(STUDENT, make_optimizer(optim, 10))


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_change_nothing(whole, size):
    batch, _ = make_batch()
    grads, metrics = gradient_of(batch, micro_batch_size=size)
    assert_close(grads, whole[0])
    ours, theirs = results_of(metrics), results_of(whole[1])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
    assert ours["policy/log_ratio_max"] == pytest.approx(theirs["policy/log_ratio_max"], abs=1e-5)


def results_of(metrics):
    one = jnp.float32(1)
    return results(metrics | {"loss": dataclasses.replace(metrics["loss"], count=one)})


def test_the_order_of_the_rows_changes_nothing(whole):
    order = np.random.default_rng(3).permutation(ROWS)
    rollout = jax.tree.map(lambda x: x[order], make_rollout())
    batch, keep = make_batch(rollout)
    np.testing.assert_array_equal(keep, np.asarray(make_batch()[1])[order])
    grads, metrics = gradient_of(batch, micro_batch_size=2)
    assert_close(grads, whole[0])
    assert results_of(metrics)["loss"] == pytest.approx(results_of(whole[1])["loss"], rel=1e-5)


@pytest.mark.parametrize("extra", [(2, 5)])
def test_padding_changes_nothing(whole, extra):
    batch, _ = make_batch(make_rollout(*extra))
    grads, metrics = gradient_of(batch)
    assert_close(grads, whole[0])
    assert results_of(metrics)["loss"] == pytest.approx(results_of(whole[1])["loss"], rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_eight_devices_give_what_one_gives(whole, micro_batch_size):
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 8

    @jax.jit
    def run(params, rollout):
        scores = cases.scored(SampledToken(), (MODEL, params), [(MODEL, TEACHER)], rollout, 1.0)
        batch, _ = cases.assembled(rollout, scores, *FIRE, "seq", 1)
        return gradients(MODEL, LOSS, params, batch, micro_batch_size=micro_batch_size)

    grads, metrics = run(replicate(mesh, STUDENT), shard_rows(mesh, make_rollout()))
    assert_close(grads, whole[0])
    assert results_of(metrics)["loss"] == pytest.approx(results_of(whole[1])["loss"], rel=1e-5)


def test_the_gradient_is_the_slope_of_the_loss(whole):
    """Central differences of the loss, summed over the tokens in float64."""
    batch, _ = make_batch()
    share = np.asarray(batch.coefficient, np.float64) * np.asarray(batch.weight, np.float64)
    advantage = np.asarray(batch.scores.teacher.logprob - batch.scores.student.logprob, np.float64)

    def surrogate(params):
        prompts = batch.rollout.prompts
        stats = jax.jit(functools.partial(response_stats, MODEL))(
            params, prompts.tokens, prompts.length, batch.rollout.tokens, batch.rollout.mask
        )
        logprob = np.where(batch.rollout.mask, np.asarray(stats.logprob, np.float64), 0)
        # At the scored parameters the ratio is 1, so the slope is that of -A log pi.
        return -(np.where(share > 0, share * advantage * logprob, 0)).sum()

    for pick in (
        lambda p: p["embed_tokens"],
        lambda p: p["layers"]["mlp"]["down_proj"]["kernel"],
    ):
        gradient = np.asarray(pick(whole[0]))
        direction = gradient / np.linalg.norm(gradient)
        leaf = np.asarray(pick(STUDENT))
        size = 5e-4

        def moved(sign, pick=pick, leaf=leaf, direction=direction, size=size):
            target = pick(STUDENT)
            return surrogate(
                jax.tree.map(
                    lambda x: jnp.asarray(leaf + sign * size * direction) if x is target else x,
                    STUDENT,
                )
            )

        slope = (moved(1) - moved(-1)) / (2 * size)
        assert slope == pytest.approx(np.linalg.norm(gradient), rel=5e-3)


def test_fire_without_its_parts_steps_like_plain_distillation_bit_for_bit():
    off = TeacherQuantile(drop_fraction=0.0), ConfidenceConfusion(alpha=0.0, beta=0.0)
    rollout = make_rollout()
    scores = score(rollout)
    ours, _ = step(fresh(), make_batch(rollout, scores, off)[0])
    plain, _ = step(fresh(), make_batch(rollout, scores, (KeepAll(), Uniform()))[0])
    assert_same_bits(ours, plain)
    fire, _ = step(fresh(), make_batch(rollout, scores)[0])
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(fire), jax.tree.leaves(plain), strict=True)
    )


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_nan_in_a_kept_row_skips_the_step_and_says_why(micro_batch_size):
    rollout = make_rollout()
    scores = with_teacher_logprob(score(rollout), 2, jnp.nan)
    batch, keep = make_batch(rollout, scores, (KeepAll(), Uniform()))
    assert keep[2]
    before, _ = step(fresh(), make_batch()[0])  # moments are no longer zero
    after, values = step(before, batch, micro_batch_size=micro_batch_size)
    assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(after.updates), int(after.skipped)) == (2, 1)
    assert values["skipped"] == 1 and not np.isfinite(values["loss"])
    assert values["nonfinite/teacher_logprob"] == rollout.mask[2].sum()
    assert values["nonfinite/student_logprob"] == values["nonfinite/token_weight"] == 0


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_nan_in_a_dropped_row_harms_nobody(micro_batch_size):
    rollout = make_rollout()
    scores = with_teacher_logprob(score(rollout), 2, jnp.nan)
    batch, keep = make_batch(rollout, scores)
    assert not keep[2]
    state, values = step(fresh(), batch, micro_batch_size=micro_batch_size)
    assert values["skipped"] == 0 == values["nonfinite/teacher_logprob"]
    assert int(state.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert np.any(state.params["embed_tokens"] != STUDENT["embed_tokens"])


def test_a_batch_without_a_valid_row_is_skipped():
    rollout = dataclasses.replace(make_rollout(), mask=np.zeros((ROWS, T), bool))
    batch, keep = make_batch(rollout)
    assert not keep.any()
    state, values = step(fresh(), batch)
    assert_same_bits(state.params, STUDENT)
    assert values["skipped"] == 1 and int(state.skipped) == 1 and values["loss"] == 0
    # The weight decay of a step without gradient must not act either.
    assert_same_bits(state.opt_state, fresh().opt_state)


def test_infinite_gradients_are_skipped():
    batch, _ = make_batch()
    huge = dataclasses.replace(batch, weight=jnp.where(batch.rollout.mask, 1e38, 0.0))
    state, values = step(fresh(), huge)
    assert values["skipped"] == 1
    assert_same_bits(state.params, STUDENT)


def test_a_step_that_would_not_be_finite_is_skipped():
    batch, _ = make_batch()
    boundless = OptimConfig(learning_rate=3e38, weight_decay=10.0)
    state, values = step(fresh(boundless), batch, boundless)
    assert np.isfinite(values["grad_norm"]) and values["skipped"] == 1
    assert skip_reason(values) == "not finite: the optimizer's step"
    assert_same_bits(state.params, STUDENT)


def test_schedules():
    def at(step, **kwargs):
        schedule = learning_rate(OptimConfig(learning_rate=2.0, **kwargs), 14)
        return float(schedule(np.int32(step)))

    assert at(0) == at(13) == 2.0
    warm = {"warmup_steps": 4}
    assert [at(s, **warm) for s in (0, 1, 2, 4, 13)] == pytest.approx([0, 0.5, 1, 2, 2])
    linear = warm | {"schedule": "linear", "final_fraction": 0.2}
    assert [at(s, **linear) for s in (2, 4, 9, 14, 20)] == pytest.approx([1, 2, 1.2, 0.4, 0.4])
    cosine = warm | {"schedule": "cosine", "final_fraction": 0.0}
    assert [at(s, **cosine) for s in (2, 4, 9, 14)] == pytest.approx([1, 2, 1, 0], abs=1e-6)
    # A warm-up as long as the run.
    assert at(14, warmup_steps=14, schedule="cosine") == pytest.approx(2.0)


def test_one_step_is_adamw_after_clipping(whole):
    optim = OptimConfig(learning_rate=1e-2, beta1=0.8, beta2=0.9, weight_decay=0.1, clip_norm=1e-3)
    batch, _ = make_batch()
    norm = float(optax.tree.norm(whole[0]))
    assert norm > 1e-3
    after, values = step(fresh(optim), batch, optim)
    again, _ = step(after, batch, optim)
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-5)
    # The first step of Adam divides the gradient by itself, up to epsilon: clipping shows there.
    clipped = np.asarray(whole[0]["embed_tokens"], np.float64) * (1e-3 / norm)
    start = np.asarray(STUDENT["embed_tokens"], np.float64)
    expected = start - 1e-2 * (clipped / (np.abs(clipped) + 1e-8) + 0.1 * start)
    np.testing.assert_allclose(after.params["embed_tokens"], expected, atol=2e-5)
    assert (int(again.updates), int(again.skipped)) == (2, 0)


def test_clipping_can_be_off():
    batch, _ = make_batch()
    assert OPTIM.clip_norm == 1.0
    off = OptimConfig(learning_rate=1e-2, clip_norm=None)
    one, _ = step(fresh(), batch)
    other, _ = step(fresh(off), batch, off)
    assert np.any(one.params["embed_tokens"] != other.params["embed_tokens"])


def test_the_clip_acts_from_the_second_update_of_a_rollout_on():
    batch, _ = make_batch()

    def after(updates, clip):
        update = jitted_update(OPTIM, clip=clip)
        state, ratio = fresh(), []
        for _ in range(updates):
            state, metrics = update(state, batch, jnp.float32(1))
            ratio.append(results(metrics)["policy/log_ratio_max"])
        return state, ratio

    narrow, ratio = after(1, 0.01)
    assert ratio[0] < 1e-5
    assert_same_bits(narrow, after(1, 0.5)[0])
    narrow, ratio = after(2, 0.01)
    assert ratio[1] > 0.01
    wide, _ = after(2, 0.5)
    assert np.any(narrow.params["embed_tokens"] != wide.params["embed_tokens"])


def test_the_temperature_reaches_the_gradient(whole):
    batch, _ = make_batch()
    grads, _ = gradient_of(batch, 2.0)
    assert np.any(np.asarray(grads["embed_tokens"]) != np.asarray(whole[0]["embed_tokens"]))
