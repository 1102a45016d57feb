"""Golden vectors of FiRe-OPD: the paper's mode, and the authors' released mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.batch import total_loss
from fireopd_jax.method.filtering import KeepAll, TeacherQuantile
from fireopd_jax.method.fire import fire_weights
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import ConfidenceConfusion
from fireopd_jax.verify import reference_batch as reference
from tests import cases, oracle

LENGTHS = np.array([4, 2, 3, 1, 4])
MASK = np.arange(4)[None, :] < LENGTHS[:, None]


def spread(*values, dtype=np.float64):
    result = np.zeros(MASK.shape, dtype)
    result[MASK] = values
    return result


TEACHER = spread(-0.1, -0.2, -0.3, -0.4, -2, -1, -0.5, -0.1, -0.9, -0.05, -3, -0.1, -0.1, -0.4)
STUDENT = spread(-0.2, -0.1, -0.5, -0.2, -1, -1.5, -0.4, -0.3, -0.6, -0.15, -1, -0.2, -0.1, -0.6)
H_TEACHER = spread(0.2, 0.4, 0.1, 0.8, 1.5, 0.7, 0.3, 0.1, 0.6, 0.05, 2, 0.1, 0.2, 0.3)
H_STUDENT = spread(0.3, 0.2, 0.6, 0.4, 1, 1.2, 0.5, 0.3, 0.7, 0.1, 1.6, 0.2, 0.1, 0.5)
KEEP = np.array([True, False, True, True, True])
WEIGHT = spread(
    *(1.006974, 0.903766, 1.196653, 0.892608),
    *(0.825921, 1.174079),
    *(1.013478, 0.966522, 1.02),
    1,
    *(0.925859, 1.015552, 0.934539, 1.124051),
)
ADVANTAGE = spread(
    *(0.100697, -0.090377, 0.239331, -0.178522),
    *(0, 0),
    *(-0.101348, 0.193304, -0.306),
    0.1,
    *(-1.851718, 0.101555, 0, 0.22481),
)


def float32(*arrays):
    return [np.asarray(array, np.float32) for array in arrays]


def loss_of(filter, reweight, aggregate):
    scores = cases.make_scores(STUDENT, TEACHER, H_STUDENT, H_TEACHER)
    batch, keep = cases.assembled(cases.make_rollout(MASK), scores, filter, reweight, aggregate, 1)
    return batch, keep, float(total_loss(SampledReverseKL()(scores.student, batch), batch))


@pytest.mark.parametrize(("aggregate", "expected"), [("seq", 0.083725889), ("token", 0.130688866)])
def test_paper(aggregate, expected):
    batch, keep, loss = loss_of(TeacherQuantile(), ConfidenceConfusion(), aggregate)
    np.testing.assert_array_equal(keep, KEEP)
    np.testing.assert_allclose(batch.weight, WEIGHT, atol=1e-6)
    weighted = np.asarray(batch.weight) * (TEACHER - STUDENT) * KEEP[:, None]
    np.testing.assert_allclose(weighted, ADVANTAGE, atol=1e-6)
    assert loss == pytest.approx(expected, abs=1e-6)


def test_released_is_the_row_scope_without_filter():
    batch, keep, loss = loss_of(KeepAll(), ConfidenceConfusion(max_scope="row"), "seq")
    assert keep.all()
    row = [1.045643, 0.79668, 1.493776, 0.6639]
    np.testing.assert_allclose(batch.weight[0], row, atol=1e-6)
    # 1e-7: float32 sums; the released 1e-8 in the denominator is below that.
    assert loss == pytest.approx(0.068240484, abs=1e-7)
    weight, kept, truth = oracle.released(TEACHER, STUDENT, H_TEACHER, H_STUDENT, MASK, 1)
    assert kept.all() and truth == pytest.approx(0.068240484, abs=1e-8)
    np.testing.assert_allclose(batch.weight, weight, rtol=1e-6)


def test_oracle_reproduces_the_released_micro_batch_of_five():
    weight, keep, loss = oracle.released(TEACHER, STUDENT, H_TEACHER, H_STUDENT, MASK, 5)
    np.testing.assert_array_equal(keep, KEEP)
    np.testing.assert_allclose(weight[0], [0.993074, 0.89129, 1.180135, 0.880287], atol=1e-6)
    np.testing.assert_allclose(weight[1, :2], [0.894041, 1.270914], atol=1e-6)
    assert loss == pytest.approx(0.126122873, abs=1e-8)


def test_oracle_reproduces_the_paper():
    keep = reference.keep_rows(TEACHER, MASK, 0.2)
    np.testing.assert_array_equal(keep, KEEP)
    weight = reference.weights(H_TEACHER, H_STUDENT, MASK, keep)
    np.testing.assert_allclose(weight, WEIGHT, atol=1e-6)
    per_token, _ = reference.sampled_reverse_kl(STUDENT, STUDENT, TEACHER, MASK)
    for aggregate, expected in (("seq", 0.083725889), ("token", 0.130688866)):
        loss = (reference.coefficients(MASK, keep, aggregate) * weight * per_token).sum()
        assert loss == pytest.approx(expected, abs=1e-9)


def test_one_call():
    weight, keep = fire_weights(*float32(TEACHER, H_TEACHER, H_STUDENT), MASK)
    np.testing.assert_array_equal(keep, KEEP)
    np.testing.assert_allclose(weight, WEIGHT, atol=1e-6)


def test_one_call_passes_its_options():
    scores, mask, teacher = cases.random_case(0, rows=10)
    stats = scores.teacher.logprob, scores.teacher.entropy, scores.student.entropy
    weight, keep = jax.jit(
        lambda *arrays: fire_weights(
            *arrays,
            drop_fraction=0.5,
            alpha=2.0,
            beta=0.5,
            filter_scope="teacher",
            max_scope="kept",
            teacher=teacher,
            num_teachers=2,
        )
    )(*stats, mask)
    expected = reference.keep_rows(stats[0], mask, 0.5, teacher)
    np.testing.assert_array_equal(keep, expected)
    truth = reference.weights(*stats[1:], mask, expected, 2.0, 0.5, "kept")
    np.testing.assert_allclose(weight, truth, rtol=2e-6)
    by_teacher, _ = fire_weights(*stats, mask, max_scope="teacher", teacher=teacher, num_teachers=2)
    truth = reference.weights(*stats[1:], mask, expected, scope="teacher", teacher=teacher)
    np.testing.assert_allclose(by_teacher, truth, rtol=2e-6)


def test_a_route_and_its_number_of_teachers_go_together():
    zeros = jnp.zeros((2, 3))
    mask = jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="go together"):
        fire_weights(zeros, zeros, zeros, mask, teacher=jnp.array([0, 1], jnp.int32))
    with pytest.raises(ValueError, match="go together"):
        fire_weights(zeros, zeros, zeros, mask, num_teachers=2)
