"""Coefficients, assembly and the total loss: micro-batches, padding and devices change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fireopd_jax.method.batch import coefficients, total_loss
from fireopd_jax.method.filtering import KeepAll, TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import ConfidenceConfusion, Uniform
from fireopd_jax.ops.head import head_stats
from fireopd_jax.types import TokenStats
from fireopd_jax.verify import reference_batch as oracle
from tests import cases

AGGREGATES = pytest.mark.parametrize("aggregate", ["seq", "token"])


def fire(rollout, scores, aggregate="seq", drop_fraction=0.3):
    stages = TeacherQuantile(drop_fraction=drop_fraction), ConfidenceConfusion()
    return cases.assembled(rollout, scores, *stages, aggregate, 2)


def loss_and_gradient(batch, logprob):
    def total(logprob):
        student = TokenStats(logprob, batch.scores.student.entropy)
        return total_loss(SampledReverseKL()(student, batch), batch)

    return jax.jit(jax.value_and_grad(total))(logprob)


@AGGREGATES
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_equal_oracle_and_sum_to_one(seed, aggregate):
    _, mask, _ = cases.random_case(seed)
    keep = np.arange(7) % 3 != 0
    ours = coefficients(mask, keep, aggregate)
    np.testing.assert_allclose(ours, oracle.coefficients(mask, keep, aggregate), rtol=1e-6)
    assert float(ours.sum()) == pytest.approx(1.0, abs=1e-6)


@AGGREGATES
def test_nothing_kept_is_all_zero(aggregate):
    mask = np.ones((2, 3), bool)
    assert not np.any(coefficients(mask, np.zeros(2, bool), aggregate))
    assert not np.any(coefficients(np.zeros((2, 3), bool), np.ones(2, bool), aggregate))
    scores, mask, teacher = cases.random_case(0)
    batch, keep = fire(cases.make_rollout(mask, teacher), scores, aggregate, drop_fraction=1.0)
    value, gradient = loss_and_gradient(batch, scores.student.logprob)
    assert not keep.any() and value == 0.0 and not np.any(gradient)


def test_kept_prefixes_count_their_own_tokens():
    mask = np.array([[True, True, True], [True, True, False]])
    prefix = np.array([[True, True, False], [False, False, False]])
    expected = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(coefficients(mask, prefix, "seq"), expected)
    np.testing.assert_array_equal(coefficients(mask, prefix, "token"), expected)


def test_unknown_aggregate_is_refused():
    with pytest.raises(Exception, match="aggregate"):
        coefficients(np.ones((1, 1), bool), np.ones(1, bool), "mean")


@AGGREGATES
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_equal_oracle(seed, aggregate):
    scores, mask, teacher = cases.random_case(seed, rows=11)
    batch, keep = fire(cases.make_rollout(mask, teacher), scores, aggregate)
    expected_keep = oracle.keep_rows(scores.teacher.logprob, mask, 0.3)
    np.testing.assert_array_equal(keep, expected_keep)
    entropies = scores.teacher.entropy, scores.student.entropy
    share = oracle.weights(*entropies, mask, expected_keep)
    share = share * oracle.coefficients(mask, expected_keep, aggregate)
    old = scores.student.logprob
    value, slope = oracle.sampled_reverse_kl(old, old, scores.teacher.logprob, mask)
    ours, gradient = loss_and_gradient(batch, old)
    assert float(ours) == pytest.approx((share * value).sum(), rel=1e-5, abs=1e-7)
    assert np.abs(gradient - share * slope).max() <= 1e-5 * np.abs(share * slope).max()


@AGGREGATES
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_add_up(micro_batch, aggregate):
    scores, mask, teacher = cases.random_case(1, rows=8)
    batch, _ = fire(cases.make_rollout(mask, teacher), scores, aggregate)
    whole, gradient = loss_and_gradient(batch, scores.student.logprob)
    parts, slopes = [], []
    for first in range(0, 8, micro_batch):
        part = jax.tree.map(lambda x, at=first: x[at : at + micro_batch], batch)
        value, slope = loss_and_gradient(part, part.scores.student.logprob)
        parts.append(value)
        slopes.append(slope)
    assert sum(map(float, parts)) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(np.concatenate(slopes), gradient, rtol=1e-6)


def test_padding_and_row_order_do_not_matter():
    scores, mask, teacher = cases.random_case(2, rows=9)
    batch, _ = fire(cases.make_rollout(mask, teacher), scores)
    value, gradient = loss_and_gradient(batch, scores.student.logprob)
    order = np.random.default_rng(0).permutation(9)
    moved = jax.tree.map(lambda x: x[order], scores)
    shuffled, _ = fire(cases.make_rollout(mask[order], teacher[order]), moved)
    other, slope = loss_and_gradient(shuffled, moved.student.logprob)
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(slope, gradient[order], rtol=1e-5)
    widths = ((0, 3), (0, 4))
    wide = jax.tree.map(lambda x: jnp.pad(x, widths), scores)
    padded, _ = fire(cases.make_rollout(np.pad(mask, widths), np.pad(teacher, (0, 3))), wide)
    other, slope = loss_and_gradient(padded, wide.student.logprob)
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(slope, np.pad(gradient, widths), rtol=1e-5)


def test_sharded_rows_equal_one_device():
    scores, mask, teacher = cases.random_case(3, rows=8)
    rollout = cases.make_rollout(mask, teacher)

    @jax.jit
    def step(rollout, scores):
        batch, keep = fire(rollout, scores)
        return batch, keep, loss_and_gradient(batch, scores.student.logprob)

    single = step(rollout, scores)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    spread = step(*jax.device_put((rollout, scores), NamedSharding(mesh, P("data"))))
    for one, many in zip(jax.tree.leaves(single), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7)


def test_fire_without_its_parts_is_plain_distillation_bit_for_bit():
    scores, mask, teacher = cases.random_case(4)
    rollout = cases.make_rollout(mask, teacher)
    bare = TeacherQuantile(drop_fraction=0.0), ConfidenceConfusion(alpha=0.0, beta=0.0)
    ours = cases.assembled(rollout, scores, *bare, "seq", 2)
    plain = cases.assembled(rollout, scores, KeepAll(), Uniform(), "seq", 2)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_nan_in_a_dropped_row_poisons_nothing():
    scores, mask, teacher = cases.random_case(5)
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), scores)
    rollout = cases.make_rollout(mask, teacher)
    batch, keep = fire(rollout, broken)
    assert not keep[0]
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.normal(size=(17, 5)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(*mask.shape, 5)), jnp.float32).at[0].set(jnp.nan)

    def total(hidden, head):
        stats = head_stats(hidden, head, jnp.asarray(rollout.tokens), chunk=8)
        student = TokenStats(stats.logprob, stats.entropy)
        return total_loss(SampledReverseKL()(student, batch), batch)

    value, (d_hidden, d_head) = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    assert np.isfinite(value) and np.isfinite(d_head).all() and np.any(d_head)
    assert np.isfinite(d_hidden).all() and not np.any(d_hidden[0])


def test_a_nan_in_a_kept_row_shows():
    scores, mask, teacher = cases.random_case(5)
    batch, _ = cases.assembled(
        cases.make_rollout(mask, teacher), scores, KeepAll(), Uniform(), "seq", 2
    )
    assert np.isnan(total_loss(jnp.full(mask.shape, jnp.nan), batch))


def test_no_gradient_passes_through_the_batch():
    scores, mask, teacher = cases.random_case(6)
    clean = jax.tree.map(lambda x: jnp.where(mask, x, 0.0), scores)

    def total(scores):
        batch, _ = fire(cases.make_rollout(mask, teacher), scores)
        return batch.weight.sum() + batch.scores.teacher.logprob.sum() + batch.coefficient.sum()

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(total)(clean)))
