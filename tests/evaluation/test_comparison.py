"""Paired comparison of two models: pairs by question, exact p values, and what cannot be paired."""

import dataclasses
import itertools

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.comparison import Side, compare
from tests.evaluation.graded import responses


def compared(one, other, **shared):
    sides = [Side(n, {"s": responses(x, **shared)}) for n, x in (("A", one), ("B", other))]
    return compare(*sides)["s"]


def test_the_difference_is_paired_by_question():
    one = [[1, 1], [1, 0], [0, 0], [1, 1]]
    other = [[1, 0], [1, 0], [0, 0], [0, 1]]
    figures = compared(one, other)
    differences = np.mean(one, axis=1) - np.mean(other, axis=1)
    signs = list(itertools.product([-1, 1], repeat=4))
    far = [abs(np.dot(each, differences)) >= differences.sum() - 1e-12 for each in signs]
    assert figures == {
        "difference": pytest.approx(differences.mean()),
        "interval_95": pytest.approx(1.96 * differences.std(ddof=1) / 2),
        "p": pytest.approx(np.mean(far)),
        "questions": 4,
        "better": 2,
        "worse": 0,
    }
    back = compared(other, one)
    assert back["difference"] == -figures["difference"] and back["p"] == figures["p"]
    assert (back["better"], back["worse"]) == (0, 2)


def test_pairing_sees_what_two_unpaired_intervals_do_not():
    """B is right on all that A is right on, and on ten questions more of a hundred."""
    one = [[1]] * 50 + [[0]] * 50
    other = [[1]] * 60 + [[0]] * 40
    figures = compared(other, one)
    assert figures["difference"] == pytest.approx(0.1)
    assert figures["p"] == pytest.approx(2 * 0.5**10)
    assert figures["interval_95"] < 0.06 < 1.96 * np.sqrt(0.5 * 0.5 / 100)


def test_the_same_model_does_not_differ_from_itself():
    figures = compared([[1, 0], [0, 1]], [[0, 1], [1, 0]])
    assert figures["difference"] == figures["interval_95"] == 0 and figures["p"] == 1


def test_duplicates_are_one_question_and_are_paired_in_order():
    questions = ["a", "a", "b", "b", "c", "c"]
    one, other = [[1], [1], [1], [1], [0], [0]], [[0], [0], [0], [0], [0], [0]]
    figures = compared(one, other, questions=questions)
    assert figures["questions"] == 3 and figures["better"] == 2
    assert figures["p"] == pytest.approx(0.5)  # of the four signs of two questions, two are as far
    alone = compared(one[::2], other[::2])
    assert figures["interval_95"] == pytest.approx(alone["interval_95"])


def test_the_sides_may_differ_in_samples_and_in_order():
    one = responses([[1, 1, 0], [0, 0, 0]])
    other = responses([[1, 0], [0, 1]])
    shuffled = [dataclasses.replace(each, row=1 - each.row) for each in other]
    figures = compare(Side("A", {"s": one}), Side("B", {"s": shuffled}))["s"]
    assert figures["difference"] == pytest.approx((2 / 3 - 1 / 2 + 0 - 1 / 2) / 2)
    assert (figures["better"], figures["worse"]) == (1, 1)


def test_what_has_no_partner_is_named():
    one, other = responses([[1], [0]]), responses([[1], [0]], questions=["q0", "other"])
    with pytest.raises(UserError, match=r"^B: not the question of s\.jsonl:2 in A"):
        compare(Side("A", {"s": one}), Side("B", {"s": other}))
    with pytest.raises(UserError, match=r"^A: not the question of s\.jsonl:2 in B"):
        compare(Side("A", {"s": one[:1]}), Side("B", {"s": one}))
    changed = [dataclasses.replace(each, answer="7") for each in one]
    with pytest.raises(UserError, match=r"^B: not the answer '0' of s\.jsonl:1 in A"):
        compare(Side("A", {"s": one}), Side("B", {"s": changed}))
    with pytest.raises(UserError, match=r"^B: no responses to the set s of A; it has t"):
        compare(Side("A", {"s": one}), Side("B", {"t": one}))
