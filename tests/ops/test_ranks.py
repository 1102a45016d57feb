"""Order statistics against plain Python."""

import collections

import jax
import numpy as np
import pytest

from fireopd_jax.ops.ranks import masked_quantile, median_by_id, ranks, repetition_rate


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.98, 1.0])
def test_quantiles_are_those_of_numpy(seed, fraction):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(5, 7)).astype(np.float32)
    mask = rng.random((5, 7)) < 0.6
    values[0, 0], mask[0, 0] = np.nan, True  # not finite: not counted
    inside = values[mask & np.isfinite(values)]
    got = masked_quantile(values, mask, fraction)
    np.testing.assert_allclose(got, np.quantile(inside, fraction), rtol=1e-5, atol=1e-6)
    assert masked_quantile(values, np.zeros_like(mask), fraction) == np.inf


def test_ranks_are_stable_and_leave_masked_values_last():
    values = np.array([[2.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]], np.float32)
    mask = np.array([[True, True, True, False], [False, True, True, True]])
    np.testing.assert_array_equal(ranks(values, mask), [[2, 0, 1, 3], [3, 0, 1, 2]])


@pytest.mark.parametrize("seed", range(4))
def test_medians_of_ids(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 6, 60).astype(np.int32)
    values = np.round(rng.normal(size=60), 1).astype(np.float32)  # with ties
    mask = rng.random(60) < 0.7
    median, count = jax.jit(median_by_id)(ids, values, mask)
    for i in range(60):
        own = np.sort(values[mask & (ids == ids[i])])
        assert count[i] == (len(own) if mask[i] else 0)
        assert median[i] == (own[(len(own) - 1) // 2] if mask[i] else 0)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repetition_is_that_of_a_counter(n):
    rng = np.random.default_rng(n)
    tokens = rng.integers(0, 3, (9, 20)).astype(np.int32)
    length = rng.integers(0, 21, 9)
    length[:3] = 0, n - 1, 20
    mask = np.arange(20)[None] < length[:, None]
    got = np.asarray(jax.jit(repetition_rate, static_argnums=2)(tokens, mask, n))
    for i in range(9):
        grams = [tuple(tokens[i, t : t + n]) for t in range(length[i] - n + 1)]
        again = len(grams) - len(collections.Counter(grams))
        assert got[i] == pytest.approx(again / max(len(grams), 1))
    assert got.max() > 0.2


def test_grams_across_a_hole_do_not_count():
    tokens = np.array([[1, 2, 9, 1, 2]], np.int32)
    assert repetition_rate(tokens, np.ones((1, 5), bool), 2)[0] == pytest.approx(1 / 4)
    hole = np.array([[True, True, False, True, True]])
    assert repetition_rate(tokens, hole, 2)[0] == pytest.approx(1 / 2)
