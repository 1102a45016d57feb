"""Token weights against the oracle, in every scope, and what must never move them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pydantic import ValidationError

from fireopd_jax.method.reweighting import (
    ConfidenceConfusion,
    Progressive,
    SoftTrajectories,
    Uniform,
)
from fireopd_jax.ops.head import head_topk
from fireopd_jax.types import StageContext
from fireopd_jax.verify import reference_batch as oracle
from tests import cases

SCOPES = pytest.mark.parametrize("scope", ["batch", "kept", "teacher", "row", "vocabulary"])
VOCABULARY = 4000


@SCOPES
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 3.0), (0.0, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_oracle(seed, alpha, beta, scope):
    scores, mask, teacher = cases.random_case(seed, rows=9, num_teachers=3)
    keep = np.arange(9) % 3 != 0
    stage = ConfidenceConfusion(alpha=alpha, beta=beta, max_scope=scope)
    ours = stage.weight(scores, StageContext(mask, teacher, 3, VOCABULARY), keep)
    entropies = scores.teacher.entropy, scores.student.entropy
    expected = oracle.weights(*entropies, mask, keep, alpha, beta, scope, teacher, VOCABULARY)
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    assert ours.dtype == jnp.float32


@SCOPES
def test_mean_is_one_on_every_trajectory_and_zero_is_masked(scope):
    scores, mask, teacher = cases.random_case(5)
    stage = ConfidenceConfusion(max_scope=scope)
    weight = stage.weight(scores, StageContext(mask, teacher, 2, VOCABULARY), np.zeros(7, bool))
    filled = mask.any(axis=1)
    mean = np.sum(weight, axis=1)[filled] / mask.sum(axis=1)[filled]
    np.testing.assert_allclose(mean, 1.0, rtol=1e-6)
    assert not np.any(np.asarray(weight)[~mask])


def test_the_largest_entropy_in_a_dropped_row():
    entropy = np.array([[1.0, 0.5], [4.0, 2.0]], np.float32)
    scores = cases.make_scores(-entropy, -entropy, entropy, entropy)
    mask, keep, teacher = np.ones((2, 2), bool), np.array([True, False]), np.zeros(2, np.int32)
    by_scope = {
        scope: np.asarray(
            ConfidenceConfusion(max_scope=scope).weight(
                scores, StageContext(mask, teacher, 1), keep
            )
        )
        for scope in ("batch", "kept", "row")
    }
    # Row 0 by hand, maximum 4: (1.75 * 1.25, 1.875 * 1.125); maximum 1: (1 * 2, 1.5 * 1.5).
    batch, kept = np.array([2.1875, 2.109375]), np.array([2.0, 2.25])
    np.testing.assert_allclose(by_scope["batch"][0], batch / batch.mean(), rtol=1e-6)
    np.testing.assert_allclose(by_scope["kept"][0], kept / kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(by_scope["row"][0], kept / kept.mean(), rtol=1e-6)
    assert np.all(by_scope["kept"][1] > 0), "dropped rows are weighted, too"


@SCOPES
def test_no_strength_is_exactly_uniform(scope):
    scores, mask, teacher = cases.random_case(6, tokens=13)
    keep = mask.any(axis=1)
    stage = ConfidenceConfusion(alpha=0, beta=0, max_scope=scope)
    ours = stage.weight(scores, StageContext(mask, teacher, 2, VOCABULARY), keep)
    np.testing.assert_array_equal(
        ours, Uniform().weight(scores, StageContext(mask, teacher, 2), keep)
    )
    np.testing.assert_array_equal(ours, mask.astype(np.float32))


@SCOPES
def test_certain_models_divide_by_no_zero(scope):
    zero = np.zeros((2, 3), np.float32)
    scores = cases.make_scores(zero, zero, zero, zero)
    mask = np.array([[True, True, False], [False, False, False]])
    nobody, teacher = np.zeros(2, bool), np.zeros(2, np.int32)
    stage = ConfidenceConfusion(max_scope=scope)
    weight = stage.weight(scores, StageContext(mask, teacher, 1, VOCABULARY), nobody)
    np.testing.assert_array_equal(weight, mask.astype(np.float32))


@pytest.mark.parametrize("scope", ["batch", "kept", "teacher"])
def test_a_broken_row_does_not_reach_the_others(scope):
    scores, mask, teacher = cases.random_case(7)
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), scores)
    empty = mask.copy()
    empty[0] = False
    keep = np.ones(7, bool)
    stage = ConfidenceConfusion(max_scope=scope)
    ours = stage.weight(broken, StageContext(mask, teacher, 2), keep)
    np.testing.assert_array_equal(
        ours[1:], stage.weight(scores, StageContext(empty, teacher, 2), keep)[1:]
    )
    assert np.isnan(ours[0]).all()


def called(stage, scores, mask, keep, teacher):
    return stage.weight(scores, StageContext(mask, teacher, 2, VOCABULARY), keep)


@SCOPES
def test_row_order_padding_and_devices_do_not_matter(scope):
    scores, mask, teacher = cases.random_case(8, rows=8)
    keep = np.arange(8) != 2
    stage = ConfidenceConfusion(max_scope=scope)
    weight = np.asarray(stage.weight(scores, StageContext(mask, teacher, 2, VOCABULARY), keep))
    order = np.random.default_rng(1).permutation(8)
    shuffled = jax.tree.map(lambda x: x[order], (scores, mask, keep, teacher))
    np.testing.assert_allclose(called(stage, *shuffled), weight[order], rtol=1e-6)
    wide = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 3))), (scores, mask))
    expected = np.pad(weight, ((0, 0), (0, 3)))
    np.testing.assert_allclose(called(stage, *wide, keep, teacher), expected, rtol=1e-6)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put((scores, mask, keep, teacher), NamedSharding(mesh, P("data")))
    sharded = jax.jit(lambda *x: called(stage, *x))(*spread)
    np.testing.assert_allclose(sharded, weight, rtol=1e-6)


def test_prefix_keep_limits_the_kept_maximum():
    entropy = np.array([[1.0, 0.5, 8.0]], np.float32)
    scores = cases.make_scores(-entropy, -entropy, entropy, entropy)
    mask, teacher = np.ones((1, 3), bool), np.zeros(1, np.int32)
    prefix = np.array([[True, True, False]])
    ours = ConfidenceConfusion(max_scope="kept").weight(
        scores, StageContext(mask, teacher, 1), prefix
    )
    # Maximum 1: the last token is clamped to c^T = 0, c^S = 1, hence equal to the first.
    raw = np.array([[2.0, 2.25, 2.0]])
    np.testing.assert_allclose(ours, raw / raw.mean(), rtol=1e-6)


def test_no_gradient_passes():
    scores, mask, teacher = cases.random_case(9)
    scores = jax.tree.map(lambda x: jnp.where(mask, x, 0.5), scores)
    keep = mask.any(axis=1)

    def total(scores):
        return (
            ConfidenceConfusion().weight(scores, StageContext(mask, teacher, 2), keep) ** 2
        ).sum()

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(total)(scores)))


def test_negative_strength_is_refused():
    with pytest.raises(ValidationError):
        ConfidenceConfusion(alpha=-1.0)


def test_the_bound_of_the_vocabulary_needs_its_size():
    scores, mask, teacher = cases.random_case(3)
    with pytest.raises(ValueError, match="'vocabulary' needs vocab_size"):
        ConfidenceConfusion(max_scope="vocabulary").weight(
            scores, StageContext(mask, teacher, 2), np.ones(7, bool)
        )


def test_the_weight_of_the_head_is_that_of_the_vocabulary_scope():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(40, 5)), jnp.float32)
    entropy = jnp.asarray(rng.uniform(0, 3, (2, 3)), jnp.float32)
    ids, mask = np.zeros((2, 3), np.int32), np.ones((2, 3), bool)
    found = head_topk(
        hidden, head, ids, k=4, student_entropy=entropy, alpha=0.5, beta=2.0, valid=37
    )
    expected = oracle.weights(
        found.entropy, entropy, mask, mask.any(axis=1), 0.5, 2.0, "vocabulary", vocab_size=37
    )
    ours = found.weight / found.weight.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_progressive_weights_fall_as_the_disagreement_is_met(gamma):
    scores, mask, teacher = cases.random_case(0)
    gap = np.abs(np.asarray(scores.teacher.logprob) - np.asarray(scores.student.logprob))
    ours = Progressive(gamma=gamma).weight(scores, StageContext(mask, teacher, 2), mask.any(axis=1))
    for i, t in np.ndindex(mask.shape):
        expected = 0.0
        if mask[i, t]:
            total = sum(gap[i, u] for u in range(mask.shape[1]) if mask[i, u])
            before = sum(gap[i, u] for u in range(t) if mask[i, u])
            expected = 1 + gamma * (1 - before / total)
        assert ours[i, t] == pytest.approx(expected, rel=1e-5)


def test_progressive_weights_without_disagreement():
    mask = np.ones((1, 3), bool)
    scores = cases.make_scores(*[np.full((1, 3), -1.0)] * 4)
    ours = Progressive().weight(
        scores, StageContext(mask, np.zeros(1, np.int32), 1), mask.any(axis=1)
    )
    np.testing.assert_array_equal(ours, np.full((1, 3), 2.0))


@pytest.mark.parametrize("scope", ["batch", "kept", "teacher", "row"])
def test_a_quantile_in_place_of_the_maximum(scope):
    scores, mask, teacher = cases.random_case(11, rows=8, tokens=20)
    keep = np.arange(8) % 3 != 0
    got = ConfidenceConfusion(max_scope=scope, max_quantile=0.8).weight(
        scores, StageContext(mask, teacher, 2), keep
    )
    for i in np.flatnonzero(mask.any(axis=1)):
        chosen = {
            "batch": np.ones(8, bool),
            "kept": keep,
            "teacher": teacher == teacher[i],
            "row": np.arange(8) == i,
        }[scope]
        inside = mask & chosen[:, None]
        shares = []
        for stats in (scores.teacher, scores.student):
            entropy = np.asarray(stats.entropy, np.float64)
            top = np.quantile(entropy[inside], 0.8)
            shares.append(np.clip(entropy[i][mask[i]] / top, 0, 1))
        raw = (2 - shares[0]) * (1 + shares[1])
        np.testing.assert_allclose(got[i][mask[i]], raw / raw.mean(), rtol=1e-4)


def test_soft_trajectories_weigh_rows_by_likelihood():
    scores, mask, teacher = cases.random_case(12)
    rows, keep = StageContext(mask, teacher, 2), mask.any(axis=1)
    got = SoftTrajectories(temperature=0.7).weight(scores, rows, keep)
    mean = np.array([scores.teacher.logprob[i][m].mean() if m.any() else -np.inf
                     for i, m in enumerate(mask)])  # fmt: skip
    share = np.exp(mean / 0.7)
    share *= keep.sum() / share.sum()
    np.testing.assert_allclose(got, np.where(mask, share[:, None], 0.0), rtol=1e-5)
    inner = ConfidenceConfusion()
    both = SoftTrajectories(temperature=0.7, tokens=inner).weight(scores, rows, keep)
    np.testing.assert_allclose(both, got * inner.weight(scores, rows, keep), rtol=1e-5)
