"""Filters that choose tokens: TIP, hard selection, prefixes, special tokens; several at once."""

import dataclasses

import jax
import numpy as np
import pytest

from fireopd_jax.method.filtering import (
    AllOf,
    GapBound,
    HardTokens,
    KeepAll,
    LeastLikely,
    Prefix,
    RepetitionGuard,
    SpecialTokens,
    TeacherQuantile,
    Tip,
)
from fireopd_jax.types import Margin, StageContext
from tests import cases


def rows_of(mask, **known):
    return StageContext(np.asarray(mask), np.zeros(len(mask), np.int32), **known)


def to_unit(values, mask):
    inside = values[mask]
    span = inside.max() - inside.min()
    return (values - inside.min()) / (span or 1)


def largest(score, mask, fraction):
    keep = np.zeros_like(mask)
    for i, row in enumerate(mask):
        real = np.flatnonzero(row)
        order = real[np.argsort(-score[i, real], kind="stable")]
        keep[i, order[: int(np.ceil(fraction * len(real) - 1e-6))]] = True
    return keep


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_tip_against_numpy(seed, fraction):
    scores, mask, _ = cases.random_case(seed, rows=9, tokens=12)
    kl = np.random.default_rng(seed).exponential(1.0, mask.shape).astype(np.float32)
    scores = dataclasses.replace(scores, reverse_kl=np.where(mask, kl, np.nan))
    got = jax.jit(lambda s: Tip(keep_fraction=fraction).keep(s, rows_of(mask)))(scores)
    entropy = np.asarray(scores.student.entropy, np.float64)
    h = to_unit(np.minimum(entropy, np.quantile(entropy[mask], 0.98)), mask)
    d = to_unit(kl.astype(np.float64), mask)
    wanted = largest(1 - (1 - h) * (1 - d), mask, fraction)
    # The entropies above the quantile are all equal: which of them stays is the order's to say.
    np.testing.assert_array_equal(got, wanted)


def test_hard_tokens_are_those_of_the_largest_weights():
    scores, mask, _ = cases.random_case(4, rows=6, tokens=9)
    got = HardTokens(keep_fraction=0.4, beta=2.0).keep(scores, rows_of(mask))
    teacher, student = (np.asarray(s.entropy, np.float64) for s in (scores.teacher, scores.student))
    score = (2 - teacher / teacher[mask].max()) * (1 + 2 * student / student[mask].max())
    np.testing.assert_array_equal(got, largest(score, mask, 0.4))


def test_of_equal_tokens_the_first_stay():
    flat = np.ones((1, 4), np.float32)
    scores = cases.make_scores(-flat, -flat, flat, flat)
    got = HardTokens(keep_fraction=0.5).keep(scores, rows_of(np.ones((1, 4), bool)))
    np.testing.assert_array_equal(got, [[True, True, False, False]])


def test_the_least_likely_fifth_stays_at_least_one_token_of_equal_ones_the_first():
    logprob = np.full((4, 11), -9.0, np.float32)
    logprob[0, :11] = [-1, -5, -1, -1, -7, -1, -1, -1, -1, -1, -6]
    logprob[1, :3] = [-1, -4, -4]
    logprob[2, :1] = np.nan
    mask = np.arange(11)[None] < np.array([11, 3, 1, 0])[:, None]
    scores = cases.make_scores(logprob, logprob, -logprob, -logprob)
    got = np.asarray(LeastLikely().keep(dataclasses.replace(scores, teacher=None), rows_of(mask)))
    # floor(2.2) = 2 of eleven; one of three, the earlier; a row's only token; none of an empty row.
    assert [np.flatnonzero(row).tolist() for row in got] == [[4, 10], [1], [0], []]
    every = LeastLikely(keep_fraction=1.0).keep(scores, rows_of(mask))
    np.testing.assert_array_equal(every, mask)


def test_a_token_without_a_number_is_not_among_the_least_likely():
    logprob = np.array([[np.nan, -1.0, -2.0, -3.0]], np.float32)
    scores, mask = cases.make_scores(logprob, logprob, -logprob, -logprob), np.ones((1, 4), bool)
    got = np.asarray(LeastLikely(keep_fraction=0.75).keep(scores, rows_of(mask)))
    np.testing.assert_array_equal(got, [[False, True, True, True]])


def test_a_prefix_ends_where_the_teacher_is_lost():
    advantage = np.array([[0.0, -1.0, -9.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0, -40.0]])
    zero = np.zeros_like(advantage)
    scores = cases.make_scores(zero, advantage, zero, zero)
    mask = np.array([[True] * 5, [True] * 4 + [False]])
    got = Prefix(window=2, least=-2.0).keep(scores, rows_of(mask))
    # Means of two: 0, -.5, -5: cut before the third.
    np.testing.assert_array_equal(got, [[True, True, False, False, False], mask[1]])
    wide = Prefix(window=5, least=-4.0).keep(scores, rows_of(mask))
    np.testing.assert_array_equal(wide, mask)


def test_special_tokens_by_name_and_by_measure():
    tokens = np.array([[5, 6, 7, 2], [5, 6, 7, 2], [5, 8, 7, 2]], np.int32)
    gap = np.array([[0, 12, 0, 30], [0, 15, 11, 30], [0, 0, 0, 30]], np.float32)
    scores = cases.make_scores(0 * gap, -gap, gap, gap)
    mask = np.ones_like(gap, bool)
    known = {"tokens": tokens, "special": (5,), "stop": (2,)}
    got = np.asarray(SpecialTokens(least=2).keep(scores, rows_of(mask, **known)))
    # 5 is named; 6 has a median above 10; 7 has one large gap of three; 2 ends a response.
    np.testing.assert_array_equal(got, (tokens != 5) & (tokens != 6))
    seldom = SpecialTokens(least=3).keep(scores, rows_of(mask, **known))
    np.testing.assert_array_equal(seldom, tokens != 5)
    named = SpecialTokens(log_ratio=None).keep(scores, rows_of(mask, **known))
    np.testing.assert_array_equal(named, tokens != 5)
    silent = np.asarray(SpecialTokens(least=2, stop=True).keep(scores, rows_of(mask, **known)))
    assert not silent[:, 3].any()


def test_the_guard_drops_loops():
    tokens = np.array([[1, 2] * 8, np.arange(16)], np.int32)
    scores, mask = cases.random_case(0, rows=2, tokens=16)[0], np.ones((2, 16), bool)
    got = RepetitionGuard(ngram=2, limit=0.5).keep(scores, rows_of(mask, tokens=tokens))
    np.testing.assert_array_equal(got, [False, True])


def test_groups_too_far_apart_are_left_out():
    scores, mask, _ = cases.random_case(0, rows=3)
    margin = Margin(np.zeros(3, np.float32), np.array([-11.0, 0.0, 10.0], np.float32))
    got = GapBound().keep(dataclasses.replace(scores, margin=margin), rows_of(np.ones_like(mask)))
    np.testing.assert_array_equal(got, [False, True, True])


def test_several_filters_see_what_those_before_have_left():
    logprob = np.array([[-1.0, -9.0], [-4.0, -4.0], [-5.0, -5.0]], np.float32)
    scores = cases.make_scores(logprob * 0, logprob, -logprob, -logprob)
    mask = np.ones((3, 2), bool)
    cut, half = Prefix(window=1, least=-8.0), TeacherQuantile(drop_fraction=0.34)
    alone = half(scores, rows_of(mask))[0]
    np.testing.assert_array_equal(alone, [False, True, True])  # means -5, -4, -5: the first goes
    both = AllOf(filters=(cut, half))(scores, rows_of(mask))[0]
    np.testing.assert_array_equal(both, [[True, False], [True, True], [False, False]])
    assert AllOf(filters=(cut, half)).needs == cut.needs | half.needs
    np.testing.assert_array_equal(AllOf(filters=(KeepAll(),))(scores, rows_of(mask))[0], mask)


def test_each_filter_has_a_memory_of_its_own_of_what_it_ranked():
    logprob = np.array([[-1.0, -9.0], [-4.0, -4.0], [-9.0, -1.0]], np.float32)
    scores = cases.make_scores(logprob * 0, logprob, -logprob, -logprob)
    cut = Prefix(window=1, least=-8.0)
    several = AllOf(filters=(cut, TeacherQuantile(window=1), TeacherQuantile(window=2)))
    state = several.init(3)
    assert [np.shape(each) for each in state] == [(0,), (1, 3, 2), (2, 3, 2)]
    context = rows_of(np.ones((3, 2), bool))
    _, (nothing, one, two) = several(scores, context, state)
    # Of the first row one token is left by the cut, of the last none.
    assert nothing == ()
    np.testing.assert_array_equal(one[0, :, 0], [-1, -4, np.nan])
    np.testing.assert_array_equal(two[1, :, 0], [-1, -4, np.nan])
    assert np.isnan(two[0]).all()
    assert AllOf(filters=(KeepAll(),)).init(3) == ((),)
