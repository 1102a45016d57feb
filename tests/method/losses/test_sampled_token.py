"""The per-token losses against the oracle, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from fireopd_jax.method.batch import coefficients
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.losses.supervised import NegativeLogLikelihood
from fireopd_jax.types import Batch, TokenStats
from fireopd_jax.verify import reference_batch as oracle
from tests import cases


def make_case(seed, move=0.0, drift=0.0):
    """Return (student, batch): the student has moved since scoring, the sampler drifted from it."""
    scores, mask, teacher = cases.random_case(seed)
    rng = np.random.default_rng(seed)
    logprob = scores.student.logprob + jnp.asarray(rng.normal(0, 1, mask.shape) * move, jnp.float32)
    drawn = scores.student.logprob + jnp.asarray(rng.normal(0, 1, mask.shape) * drift, jnp.float32)
    batch = Batch(
        cases.make_rollout(mask, teacher, drawn),
        scores,
        jnp.ones(mask.shape),
        coefficients(mask, mask.any(axis=1), "seq"),
    )
    return TokenStats(logprob, scores.student.entropy), batch


def derivative(loss, student, batch):
    def total(logprob):
        return loss(TokenStats(logprob, student.entropy), batch).sum()

    return jax.jit(jax.grad(total))(student.logprob)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("move", [0.0, 0.3, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_oracle(seed, move, cap):
    student, batch = make_case(seed, move, drift=0.5)
    loss = SampledReverseKL(importance_cap=cap)
    value, slope = oracle.sampled_reverse_kl(
        student.logprob,
        batch.scores.student.logprob,
        batch.scores.teacher.logprob,
        np.asarray(batch.rollout.mask),
        rollout=batch.rollout.logprob,
        cap=cap,
    )
    np.testing.assert_allclose(loss(student, batch), value, rtol=2e-5, atol=1e-6)
    ours = derivative(loss, student, batch)
    np.testing.assert_allclose(ours, slope, rtol=2e-5, atol=1e-6)


def test_masked_positions_are_exactly_zero():
    student, batch = make_case(0)
    mask = np.asarray(batch.rollout.mask)
    for junk in (np.nan, np.inf, -np.inf):
        spoil = lambda x, junk=junk: jnp.where(mask, x, junk)  # noqa: E731
        dirty = Batch(
            cases.make_rollout(mask, logprob=spoil(batch.rollout.logprob)),
            jax.tree.map(spoil, batch.scores),
            batch.weight,
            batch.coefficient,
        )
        spoiled = jax.tree.map(spoil, student)
        for loss in (SampledReverseKL(importance_cap=2.0), NegativeLogLikelihood()):
            value, slope = loss(spoiled, dirty), derivative(loss, spoiled, dirty)
            assert np.isfinite(value).all() and np.isfinite(slope).all()
            assert not np.any(np.asarray(value)[~mask]) and not np.any(np.asarray(slope)[~mask])
            assert np.all(np.asarray(slope)[mask])


def test_on_policy_gradient_is_minus_the_advantage():
    student, batch = make_case(1)
    ours = derivative(SampledReverseKL(), student, batch)
    advantage = batch.scores.teacher.logprob - batch.scores.student.logprob
    expected = np.where(batch.rollout.mask, -advantage, 0.0)
    np.testing.assert_array_equal(ours, expected)


def test_no_gradient_to_what_is_fixed():
    student, batch = make_case(2, move=0.1, drift=0.1)
    clean = jax.tree.map(lambda x: jnp.where(batch.rollout.mask, x, 0.0), batch.scores)

    def total(scores, drawn):
        rollout = cases.make_rollout(batch.rollout.mask, logprob=drawn)
        changed = Batch(rollout, scores, batch.weight, batch.coefficient)
        return SampledReverseKL(importance_cap=2.0)(student, changed).sum()

    grads = jax.grad(total, argnums=(0, 1))(clean, jnp.zeros(batch.weight.shape))
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_negative_log_likelihood():
    student, batch = make_case(3)
    mask = np.asarray(batch.rollout.mask)
    value = NegativeLogLikelihood()(student, batch)
    np.testing.assert_array_equal(value, np.where(mask, -student.logprob, 0.0))
    slope = derivative(NegativeLogLikelihood(), student, batch)
    np.testing.assert_array_equal(slope, np.where(mask, -1.0, 0.0))


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"clip": -1.0}, {"importance_cap": 0.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValidationError):
        SampledReverseKL(**options)
