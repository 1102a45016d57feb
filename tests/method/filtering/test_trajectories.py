"""The trajectory filter against the oracle, its ties, empty rows and scopes."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pydantic import ValidationError

from fireopd_jax.method.filtering import KeepAll, LengthDrop, RandomDrop, Reopold, TeacherQuantile
from fireopd_jax.method.filtering.trajectories import trajectory_score
from fireopd_jax.method.losses.base import TokenLoss
from fireopd_jax.method.stage import Filter, StatelessFilter
from fireopd_jax.types import StageContext
from fireopd_jax.verify import reference_batch as oracle
from tests import cases


def keep_of(logprob, mask, num_teachers=1, teacher=None, **options):
    logprob, mask = np.asarray(logprob, np.float32), np.asarray(mask)
    teacher = np.zeros(len(mask), np.int32) if teacher is None else np.asarray(teacher, np.int32)
    scores = cases.make_scores(logprob, logprob, logprob, logprob)
    context = StageContext(mask, teacher, num_teachers)
    return np.asarray(TeacherQuantile(**options)(scores, context)[0])


@pytest.mark.parametrize("scope", ["batch", "teacher"])
@pytest.mark.parametrize("drop_fraction", [0.0, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_oracle(seed, drop_fraction, scope):
    scores, mask, teacher = cases.random_case(seed, rows=13, num_teachers=3)
    keep, _ = TeacherQuantile(drop_fraction=drop_fraction, scope=scope)(
        scores, StageContext(mask, teacher, 3)
    )
    groups = teacher if scope == "teacher" else None
    expected = oracle.keep_rows(scores.teacher.logprob, mask, drop_fraction, groups)
    np.testing.assert_array_equal(keep, expected)


@pytest.mark.parametrize("drop_fraction", [0.1, 0.2, 0.29, 0.3, 0.7])
@pytest.mark.parametrize("rows", [1, 4, 5, 10, 100])
def test_drops_the_floor_of_the_fraction(drop_fraction, rows):
    logprob = -np.random.default_rng(0).permutation(rows)[:, None].astype(np.float32)
    keep = keep_of(logprob, np.ones((rows, 1), bool), drop_fraction=drop_fraction)
    # 29 of 100: binary 0.29 * 100 lies below 29.
    assert rows - keep.sum() == round(drop_fraction * 100) * rows // 100


def test_score_is_the_mean_over_the_row():
    mask = np.array([[True, True, True], [True, False, False]])
    keep = keep_of([[-1.0, -1.0, -1.0], [-2.0, 0.0, 0.0]], mask, drop_fraction=0.5)
    np.testing.assert_array_equal(keep, [True, False])


def test_ties_drop_the_earlier_row():
    keep = keep_of([[-1.0], [-2.0], [-2.0], [-2.0]], np.ones((4, 1), bool), drop_fraction=0.5)
    np.testing.assert_array_equal(keep, [True, False, False, True])


def test_one_row_stays_until_everything_goes():
    mask = np.ones((1, 2), bool)
    assert keep_of([[-1.0, -1.0]], mask, drop_fraction=0.99).all()
    assert not keep_of([[-1.0, -1.0]], mask, drop_fraction=1.0).any()


def test_empty_rows_are_neither_ranked_nor_kept():
    mask = np.array([[True], [False], [True], [False], [True]])
    keep = keep_of([[-1.0], [-9.0], [-3.0], [-9.0], [-2.0]], mask, drop_fraction=0.4)
    np.testing.assert_array_equal(keep, [True, False, False, False, True])
    assert not keep_of(np.zeros((2, 3)), np.zeros((2, 3), bool), drop_fraction=0.5).any()


def test_a_nan_row_ranks_lowest():
    logprob = [[-1.0], [-50.0], [np.nan], [-2.0]]
    keep = keep_of(logprob, np.ones((4, 1), bool), drop_fraction=0.25)
    np.testing.assert_array_equal(keep, [True, True, False, True])


def test_each_teacher_drops_its_own():
    logprob, teacher = [[-1.0], [-2.0], [-10.0], [-20.0]], [0, 0, 1, 1]
    mask = np.ones((4, 1), bool)
    options = {"drop_fraction": 0.5, "teacher": teacher, "num_teachers": 2}
    np.testing.assert_array_equal(keep_of(logprob, mask, **options), [True, True, False, False])
    own = keep_of(logprob, mask, scope="teacher", **options)
    np.testing.assert_array_equal(own, [True, False, True, False])


def called(stage, scores, mask, teacher):
    return stage(scores, StageContext(mask, teacher, 2))[0]


def test_row_order_and_padding_do_not_matter():
    scores, mask, teacher = cases.random_case(3, rows=11)
    stage = TeacherQuantile(drop_fraction=0.3, scope="teacher")
    keep = np.asarray(called(stage, scores, mask, teacher))
    order = np.random.default_rng(1).permutation(11)
    shuffled = jax.tree.map(lambda x: x[order], (scores, mask, teacher))
    np.testing.assert_array_equal(called(stage, *shuffled), keep[order])
    wide = jax.tree.map(lambda x: np.pad(x, ((0, 5), (0, 3))), (scores, mask))
    padded = called(stage, *wide, np.pad(teacher, (0, 5)))
    np.testing.assert_array_equal(padded, np.pad(keep, (0, 5)))


def test_sharded_rows_equal_one_device():
    scores, mask, teacher = cases.random_case(4, rows=16)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    stage = TeacherQuantile(drop_fraction=0.4, scope="teacher")
    compiled = jax.jit(lambda *x: called(stage, *x))
    spread = jax.device_put((scores, mask, teacher), NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(compiled(*spread), called(stage, scores, mask, teacher))


def test_keep_all_keeps_what_holds_a_token():
    scores, mask, teacher = cases.random_case(0)
    keep = KeepAll().keep(scores, StageContext(mask, teacher, 2))
    np.testing.assert_array_equal(keep, mask.any(axis=1))
    assert not keep[1]
    nothing = TeacherQuantile(drop_fraction=0.0)(scores, StageContext(mask, teacher, 2))[0]
    np.testing.assert_array_equal(keep, nothing)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_the_unit_interval_is_refused(fraction):
    with pytest.raises(ValidationError):
        TeacherQuantile(drop_fraction=fraction)


def reopold(scores, mask, progress, **options):
    return np.asarray(
        Reopold(**options).keep(
            scores, StageContext(mask, np.zeros(len(mask), np.int32), 1, progress=progress)
        )
    )


@pytest.mark.parametrize("seed", range(3))
def test_reopold_selects_tokens_by_phase(seed):
    scores, mask, _ = cases.random_case(seed)
    gap = np.asarray(scores.teacher.logprob, np.float64) - np.asarray(scores.student.logprob)
    entropy = np.asarray(scores.student.entropy)
    first = reopold(scores, mask, 0.49)
    np.testing.assert_array_equal(first, mask & (gap >= np.log(0.1) / 0.9))
    second = reopold(scores, mask, 0.5)
    bound = np.quantile(entropy[mask].astype(np.float64), 0.8)
    np.testing.assert_array_equal(second, mask & (entropy >= bound - 1e-6))
    assert 0 < second.sum() < mask.sum()
    assert np.array_equal(reopold(scores, mask, 0.9, entropy_fraction=1.0), mask)
    assert np.array_equal(reopold(scores, mask, 0.3, switch=0.2), second)


def test_the_student_relative_score_forgives_what_the_student_finds_unlikely_too():
    mask = np.ones((3, 2), bool)
    teacher = np.array([[-5.0, -5.0], [-1.0, -1.0], [-2.0, -2.0]])
    student = np.array([[-5.0, -5.0], [-0.1, -0.1], [-1.9, -1.9]])
    scores = cases.make_scores(student, teacher, -student, -teacher)
    route = np.zeros(3, np.int32)
    by = {
        score: np.asarray(
            TeacherQuantile(drop_fraction=0.4, score=score)(scores, StageContext(mask, route, 1))[0]
        )
        for score in ("likelihood", "student_relative")
    }
    np.testing.assert_array_equal(by["likelihood"], [False, True, True])
    np.testing.assert_array_equal(by["student_relative"], [True, False, True])
    assert "student.logprob" in TeacherQuantile(score="student_relative").needs


def test_lots_are_the_rows_own_and_as_many_go():
    scores, mask, teacher = cases.random_case(0, rows=20)
    mask = np.ones_like(mask)
    ids = np.arange(20, dtype=np.int32) * 7
    rows = StageContext(mask, teacher, sample_id=ids)
    keep = np.asarray(RandomDrop(drop_fraction=0.3).keep(scores, rows))
    assert keep.sum() == 14
    order = np.random.default_rng(1).permutation(20)
    again = RandomDrop(drop_fraction=0.3).keep(
        scores, StageContext(mask, teacher, sample_id=ids[order])
    )
    np.testing.assert_array_equal(again, keep[order])
    other = np.asarray(RandomDrop(drop_fraction=0.3, seed=1).keep(scores, rows))
    assert other.sum() == 14 and (other != keep).any()


def test_the_longest_or_the_shortest_go():
    mask = np.arange(4)[None] < np.array([1, 4, 2, 3, 0])[:, None]
    scores, rows = (
        cases.random_case(0, rows=5, tokens=4)[0],
        StageContext(mask, np.zeros(5, np.int32)),
    )
    longest = LengthDrop(drop_fraction=0.25).keep(scores, rows)
    np.testing.assert_array_equal(longest, [True, False, True, True, False])
    shortest = LengthDrop(drop_fraction=0.25, drop="shortest").keep(scores, rows)
    np.testing.assert_array_equal(shortest, [False, True, True, True, False])


@pytest.mark.parametrize("scope", ["batch", "teacher"])
def test_a_window_ranks_among_the_rows_of_earlier_batches(scope):
    stage = TeacherQuantile(drop_fraction=0.25, scope=scope, window=2)
    recent = stage.init(4)
    assert recent.shape == (2, 4, 2) and np.isnan(recent).all()
    seen = []
    for step in range(5):
        scores, mask, teacher = cases.random_case(step, rows=4)
        keep, recent = stage(scores, StageContext(mask, teacher, 2), recent)
        keep, recent = np.asarray(keep), np.asarray(recent)
        own = np.asarray(trajectory_score(scores.teacher.logprob, mask))
        valid = mask.any(axis=1)
        seen.append([(own[i], teacher[i]) for i in np.flatnonzero(valid)])
        pool = [each for batch in seen[-3:] for each in batch]
        for i in range(4):
            group = [s for s, t in pool if scope == "batch" or t == teacher[i]]
            below = sum(s < own[i] for s in group)
            assert keep[i] == (valid[i] and below >= int(0.25 * len(group) + 1e-9)), (step, i)
    assert not np.isnan(recent[:, 0]).any() and np.isnan(recent[:, 1, 0]).all()


def test_a_filter_without_a_window_has_no_state():
    scores, mask, teacher = cases.random_case(0)
    for stage in (KeepAll(), TeacherQuantile(), RandomDrop()):
        context = StageContext(mask, teacher, 2, sample_id=np.arange(7, dtype=np.int32))
        assert stage.init(7) == () and stage(scores, context, ())[1] == ()


def test_a_stage_that_lacks_its_method_cannot_be_made():
    for base, method in ((StatelessFilter, "keep"), (Filter, "__call__"), (TokenLoss, "__call__")):
        incomplete = type("Incomplete", (base,), {"kind": "incomplete"})
        with pytest.raises(TypeError, match=f"abstract.*{method}"):
            incomplete()
