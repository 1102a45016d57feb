"""Graded responses: the margin of each prompt against plain Python, and its place in the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.method.scoring.outcomes import OutcomeMargin
from fireopd_jax.types import TokenStats
from tests import cases

GROUP = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2], np.int32)
CORRECT = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0], np.float32)


def case(seed=0):
    scores, mask, _ = cases.random_case(seed, rows=9)
    rollout = cases.make_rollout(mask)
    prompts = dataclasses.replace(rollout.prompts, group=GROUP)
    return scores, mask, dataclasses.replace(rollout, prompts=prompts, correct=CORRECT)


@pytest.mark.parametrize("delta", [0.4, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_margins_are_those_of_the_formula(seed, delta):
    scores, mask, rollout = case(seed)
    margin = jax.jit(OutcomeMargin(delta=delta))(scores, rollout).margin
    advantage = np.asarray(scores.teacher.logprob - scores.student.logprob, np.float64)
    for i in range(9):
        peers = [j for j in range(9) if GROUP[j] == GROUP[i] and mask[j].any()]
        mean = {j: advantage[j][mask[j]].mean() for j in peers}
        right, wrong = ([mean[j] for j in peers if CORRECT[j] == c] for c in (1, 0))
        gap = np.mean(right) - np.mean(wrong) if right and wrong and mask[i].any() else 0.0
        push = max(0.0, delta - gap) / 2 if right and wrong and mask[i].any() else 0.0
        np.testing.assert_allclose(margin.gap[i], gap, atol=1e-5)
        np.testing.assert_allclose(margin.shift[i], push if CORRECT[i] else -push, atol=1e-5)


def test_a_group_of_one_sort_is_left_alone():
    scores, _, rollout = case()
    margin = OutcomeMargin()(scores, rollout).margin
    assert not np.any(np.asarray(margin.shift)[GROUP == 1])
    everyone = OutcomeMargin()(
        scores, dataclasses.replace(rollout, correct=np.ones(9, np.float32))
    ).margin
    assert not np.any(everyone.shift) and not np.any(everyone.gap)


def test_the_loss_adds_the_shift_to_every_advantage():
    scores, mask, rollout = case()
    scores = OutcomeMargin(delta=2.0)(scores, rollout)
    batch, _ = cases.assembled(rollout, scores, KeepAll(), Uniform(), "token", 1)
    finite = jnp.where(mask, scores.student.logprob, 0.0)

    def slope(loss):
        return jax.grad(lambda x: loss(TokenStats(x, x), batch).sum())(finite)

    moved = slope(SampledReverseKL(margin=True)) - slope(SampledReverseKL())
    wanted = np.where(mask, -np.asarray(scores.margin.shift)[:, None], 0.0)
    np.testing.assert_allclose(moved, wanted, atol=1e-5)
    assert "margin" in SampledReverseKL(margin=True).needs
    with pytest.raises(ValueError, match="needs graded responses"):
        plain = dataclasses.replace(batch, scores=dataclasses.replace(scores, margin=None))
        SampledReverseKL(margin=True)(TokenStats(finite, finite), plain)
