"""OPSA: a negative advantage on a student's own least likely tokens, without a teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.batch import total_loss
from fireopd_jax.method.filtering import KeepAll, LeastLikely
from fireopd_jax.method.losses.self_adaptation import SelfAdaptation
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.ops.head import head_stats
from fireopd_jax.training.update import gradients
from fireopd_jax.types import Scores, TokenStats
from fireopd_jax.verify import reference as oracle
from fireopd_jax.verify.cases import bigram, random_params, small_rollout
from tests import cases

FIXED = SelfAdaptation(advantage=-0.5, entropy_slope=0.0)


def of(logprob, entropy, mask, filter, loss, moved=None):
    """Return the batch, the loss [B, T] and the gradient of its sum to log p, without a teacher."""
    stats = TokenStats(*(jnp.asarray(x, jnp.float32) for x in (logprob, entropy)))
    batch, keep = cases.assembled(
        cases.make_rollout(mask), Scores(stats, None), filter, Uniform(), "seq"
    )

    def total(logprob):
        value = loss(TokenStats(logprob, stats.entropy), batch)
        return total_loss(value, batch), value

    now = stats.logprob if moved is None else jnp.asarray(moved, jnp.float32)
    gradient, value = jax.jit(jax.grad(total, has_aux=True))(now)
    return batch, keep, np.asarray(value), np.asarray(gradient)


def test_the_paper_s_advantages_on_the_kept_tokens():
    logprob = np.array([[-0.1, -3.0, -0.1, -2.0, -1.5, -0.1], [-0.5, -0.2, 0, 0, 0, 0]])
    entropy = np.array([[9.0, 1.0, 9.0, 3.0, 2.0, 9.0], [0.7, 0.2, 0, 0, 0, 0]])
    mask = np.array([[True] * 6, [True, True] + [False] * 4])
    _, keep, value, gradient = of(
        logprob, entropy, mask, LeastLikely(keep_fraction=0.5), SelfAdaptation()
    )
    np.testing.assert_array_equal(keep, [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
    # A = -1/2 - (H - 1) / (2 (3 - 1)) on the first row; a row's only token has -1.
    advantage = -np.array([[0, 0.5, 0, 1.0, 0.75, 0], [1.0, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(value, -advantage, atol=1e-6)
    # Each row counts once: 1/3 and 1 over two rows. Descent lowers every kept log p.
    share = np.array([[1 / 6] * 6, [1 / 2] * 6])
    np.testing.assert_allclose(gradient, -advantage * share, atol=1e-6)


def test_the_opposite_slope_and_one_fixed_advantage():
    logprob, entropy = np.full((1, 3), -1.0), np.array([[1.0, 2.0, 3.0]])
    mask = np.ones((1, 3), bool)
    for loss, expected in (
        (SelfAdaptation(entropy_slope=-1.0), [1.0, 0.75, 0.5]),
        (FIXED, [0.5, 0.5, 0.5]),
        (SelfAdaptation(advantage=0.2, entropy_slope=0.0), [-0.2] * 3),
    ):
        value = of(logprob, entropy, mask, KeepAll(), loss)[2]
        np.testing.assert_allclose(value[0], expected, atol=1e-6)
    assert FIXED.needs == {"student.logprob"}
    assert SelfAdaptation().needs == {"student.logprob", "student.entropy"}


def test_equal_entropies_have_the_largest_advantage():
    value = of(
        np.full((2, 3), -1.0),
        np.full((2, 3), 0.4),
        np.ones((2, 3), bool),
        KeepAll(),
        SelfAdaptation(),
    )[2]
    np.testing.assert_allclose(value, 1.0, atol=1e-6)


def test_a_token_that_has_become_unlikely_enough_is_left_alone():
    """Beyond the clipping range the gradient of a negative advantage is 0."""
    logprob, mask = np.full((1, 2), -1.0), np.ones((1, 2), bool)
    moved = logprob + np.array([[-0.3, -0.1]])
    gradient = of(logprob, -logprob, mask, KeepAll(), FIXED, moved)[3]
    assert gradient[0, 0] == 0 and gradient[0, 1] > 0


def test_rows_without_tokens_and_broken_rows_that_are_masked_move_nothing():
    scores, mask, _ = cases.random_case(0)
    stats = scores.student
    _, keep, value, gradient = of(
        stats.logprob, stats.entropy, mask, LeastLikely(), SelfAdaptation()
    )
    keep = np.asarray(keep)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    assert (gradient[keep] > 0).all() and not gradient[~keep].any() and not value[~keep].any()
    empty = np.zeros_like(mask)
    none = of(stats.logprob, stats.entropy, empty, LeastLikely(), SelfAdaptation())
    assert not none[2].any() and not none[3].any()


def mean_gradient(z, chosen):
    """Return the mean gradient to the logits over y ~ p, of the tokens in `chosen`."""
    log_p = oracle.log_softmax(z)
    count = len(z)
    mask = np.ones((count, 1), bool)
    entropy = np.full((count, 1), 1.0)
    tokens = np.arange(count)
    batch, *_ = of(log_p[:, None], entropy, mask, KeepAll(), FIXED)
    batch = dataclasses.replace(
        batch, coefficient=jnp.asarray(np.isin(tokens, chosen)[:, None], jnp.float32)
    )

    def total(z):
        logprob = jax.nn.log_softmax(z, axis=1)[tokens, tokens][:, None]
        return total_loss(FIXED(TokenStats(logprob, batch.scores.student.entropy), batch), batch)

    gradient = jax.grad(total)(jnp.asarray(np.tile(z, (count, 1)), jnp.float32))
    return np.exp(log_p) @ np.asarray(gradient, np.float64)


def test_all_of_the_signal_is_in_the_choice_of_tokens():
    """Over all tokens the mean gradient is 0; over a tail, mass leaves it for the rest."""
    z = np.random.default_rng(0).normal(size=8) * 1.5
    assert np.abs(mean_gradient(z, np.arange(8))).max() < 1e-7
    p = np.exp(oracle.log_softmax(z))
    tail = np.argsort(p)[:4]
    held = p[tail].sum()
    expected = 0.5 * p * np.where(np.isin(np.arange(8), tail), 1 - held, -held)
    np.testing.assert_allclose(mean_gradient(z, tail), expected, atol=1e-6)


def test_a_model_s_tail_loses_probability_without_a_teacher():
    """Through the update: a step against the gradient lowers the kept tokens' log p."""
    model, rollout = bigram(), small_rollout(8)
    params = random_params(model, 0)
    asked = rollout.prompts.tokens, rollout.prompts.length, rollout.tokens, rollout.mask

    @jax.jit
    def stats(params):
        hidden, head = model.response_hidden(params, *asked)
        found = head_stats(hidden, head, jnp.asarray(rollout.tokens))
        return TokenStats(found.logprob, found.entropy)

    scores = Scores(stats(params), None)
    batch, keep = cases.assembled(rollout, scores, LeastLikely(), Uniform(), "seq")
    keep, length = np.asarray(keep), np.asarray(rollout.mask).sum(axis=1)
    np.testing.assert_array_equal(keep.sum(axis=1), length > 0)
    grads, metrics = jax.jit(lambda p, b: gradients(model, SelfAdaptation(), p, b))(params, batch)
    assert float(metrics["loss"].total) == pytest.approx(1.0, abs=1e-6)
    after = stats(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    moved = np.asarray(after.logprob - scores.student.logprob)
    assert (moved[keep] < 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_advantage_is_a_number(value):
    with pytest.raises(ValueError, match="advantage"):
        SelfAdaptation(advantage=value)
