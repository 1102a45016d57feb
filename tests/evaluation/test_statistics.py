"""pass@k, maj@k, clustered intervals and p values, against enumerations of everything possible."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireopd_jax.evaluation.statistics import (
    by_cluster,
    interval_95,
    majority,
    pass_at_k,
    sign_flip_p,
    sizes,
)


def test_the_sizes_are_powers_of_two_and_the_number_of_samples():
    assert [sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize("samples", [1, 2, 3, 6])
def test_pass_at_k_is_the_share_of_all_choices_with_a_correct_response(samples):
    every = np.asarray(list(itertools.product([False, True], repeat=samples)))
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(range(samples), k))
        expected = [np.mean([row[list(choice)].any() for choice in choices]) for row in every]
        np.testing.assert_allclose(pass_at_k(every, k), expected, rtol=0, atol=1e-15)


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_to_one():
    correct = np.zeros((1, 10_000), bool)
    correct[0, :3] = True
    exact = 1 - math.comb(9_997, 5_000) / math.comb(10_000, 5_000)
    assert pass_at_k(correct, 5_000)[0] == pytest.approx(exact, abs=1e-12)
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(correct[:, :2], 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=7))
def test_the_majority_is_the_expected_score_over_ties(finals):
    """Correct is `a`; a tie is broken by drawing one of the answers with most votes."""
    answers = [each for each in set(finals) if each]
    most = max((finals.count(each) for each in answers), default=0)
    tied = [each for each in answers if finals.count(each) == most]
    expected = np.mean([each == "a" for each in tied]) if tied else 0.0
    assert majority(finals, [each == "a" for each in finals]) == pytest.approx(expected)


def test_an_empty_answer_has_no_vote():
    assert majority(["", "", "", "7"], [False, False, False, True]) == 1.0
    assert majority(["", ""], [False, False]) == 0.0


def test_the_interval_of_single_values_is_the_usual_one():
    values = np.asarray([0.0, 1.0, 0.5, 0.25])
    usual = 1.96 * values.std(ddof=1) / 2
    assert interval_95(values, np.asarray([7, 1, 3, 2])) == pytest.approx(usual)
    assert math.isnan(interval_95(values, np.zeros(4, int)))
    assert math.isnan(interval_95(np.zeros(0), np.zeros(0, int)))


def test_duplicates_are_one_question():
    """A set with every problem twice says no more than the set itself; plain errors would."""
    values = np.asarray([0.0, 1.0, 0.5, 0.25])
    twice, cluster = np.repeat(values, 2), np.repeat(np.arange(4), 2)
    alone = interval_95(values, np.arange(4))
    assert interval_95(twice, cluster) == pytest.approx(alone)
    assert interval_95(twice, np.arange(8)) < 0.75 * alone


def test_the_clustered_error_is_that_of_its_formula():
    rng = np.random.default_rng(0)
    values, cluster = rng.random(30), rng.integers(0, 9, 30)
    off = values - values.mean()
    sums = {c: sum(off[i] for i in range(30) if cluster[i] == c) for c in cluster}
    error = math.sqrt(len(sums) / (len(sums) - 1) * sum(s**2 for s in sums.values())) / 30
    assert interval_95(values, cluster) == pytest.approx(1.96 * error)
    found = by_cluster(off, cluster)
    np.testing.assert_allclose(found, [sums[c] for c in sorted(sums)], atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=0, max_size=9))
def test_the_p_value_is_the_share_of_all_signs_that_is_as_far(differences):
    signs = itertools.product([-1, 1], repeat=len(differences))
    sums = [sum(s * d for s, d in zip(each, differences, strict=True)) for each in signs]
    expected = np.mean([abs(each) >= abs(sum(differences)) for each in sums])
    assert sign_flip_p(np.asarray(differences, int)) == pytest.approx(expected, abs=1e-12)


def test_the_p_value_of_a_large_set_is_that_of_the_normal_distribution():
    rng = np.random.default_rng(1)
    differences = rng.integers(-8, 9, 1319)
    # The sums lie 2 apart: half of that is the correction for continuity.
    z = (abs(differences.sum()) - 1) / np.sqrt(np.sum(differences**2.0))
    normal = math.erfc(z / math.sqrt(2))
    assert sign_flip_p(differences) == pytest.approx(normal, abs=2e-3)
    assert sign_flip_p(np.full(2000, 3)) < 1e-100
