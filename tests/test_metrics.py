import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.metrics import Max, Mean, merge, results

VALUES = np.array([1.0, -2.0, 4.0, 8.0], np.float32)
KEPT = np.array([True, True, False, True])


def test_mean_and_max_see_only_what_is_kept():
    metrics = {"mean": Mean.of(VALUES, KEPT), "max": Max.of(VALUES[:3], KEPT[:3])}
    assert results(metrics) == {"mean": pytest.approx(7 / 3), "max": 1.0}


def test_nan_outside_the_mask_does_not_count():
    values = np.where(KEPT, VALUES, np.nan).astype(np.float32)
    metrics = results({"mean": Mean.of(values, KEPT), "max": Max.of(values, KEPT)})
    assert metrics == {"mean": pytest.approx(7 / 3), "max": 8.0}


def test_merged_parts_are_the_whole_however_uneven():
    parts = [slice(0, 1), slice(1, 4)]
    one, other = ({"a": Mean.of(VALUES[s]), "b": {"c": Max.of(VALUES[s])}} for s in parts)
    merged = merge(one, other)
    assert results({"a": merged["a"]}) == {"a": VALUES.mean()}
    assert results({"c": merged["b"]["c"]}) == {"c": 8.0}


def test_nothing_is_nan_and_is_neutral_in_a_merge():
    nothing = np.zeros(4, bool)
    empty = {"mean": Mean.of(VALUES, nothing), "max": Max.of(VALUES, nothing)}
    assert all(math.isnan(value) for value in results(empty).values())
    full = {"mean": Mean.of(VALUES), "max": Max.of(-abs(VALUES))}
    assert results(merge(empty, full)) == {"mean": VALUES.mean(), "max": -1.0}


def test_sums_are_float32_whatever_the_values():
    values = jnp.ones(4096, jnp.bfloat16)
    mean = Mean.of(values)
    assert mean.total.dtype == jnp.float32 and float(mean.total) == 4096
    assert results({"tokens": Mean.of(np.array([3, 4], np.int32))}) == {"tokens": 3.5}


def test_metrics_pass_through_jit_and_scan():
    def add(total, row):
        return merge(total, {"x": Mean.of(row)}), None

    start = {"x": Mean.of(jnp.zeros(2), jnp.zeros(2, bool))}
    total, _ = jax.jit(lambda rows: jax.lax.scan(add, start, rows))(VALUES.reshape(2, 2))
    assert results(total) == {"x": VALUES.mean()}
    assert float(jax.jit(Mean.result)(total["x"])) == VALUES.mean()


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(Exception, match="where"):
        Mean.of(VALUES, KEPT[:2])


def test_results_fetches_without_implicit_transfers():
    metrics = {"mean": Mean.of(jnp.asarray(VALUES)), "max": Max.of(jnp.asarray(VALUES))}
    with jax.transfer_guard("disallow"):
        assert results(metrics) == {"mean": VALUES.mean(), "max": 8.0}
