"""Paired comparison of two models, or two steps, on the same questions.

graded responses of both -> pairs by question and answer -> difference, interval, p value
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.responses import Graded, rectangle
from fireopd_jax.evaluation.statistics import by_cluster, interval_95, sign_flip_p

Rows = list[list[Graded]]
"""The responses to each problem."""
Problem = tuple[str, str, int]
"""A problem: its question, its answer, and its number among those that are equal in both."""
Figures = dict[str, float | int]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two: its name in errors, and its responses by set."""

    name: str
    sets: Mapping[str, Sequence[Graded]]


def compare(one: Side, other: Side) -> dict[str, Figures]:
    """Return, by set, how much better `one` is than `other`; see `difference`.

    Raises UserError for a set, or a question, that only one of them has.
    """
    for name in (*one.sets, *other.sets):
        for side, without in ((one, other), (other, one)):
            if name not in without.sets:
                raise UserError(
                    f"{without.name}: no responses to the set {name} of {side.name}; it has "
                    f"{', '.join(without.sets)}"
                )
    return {
        name: difference(*pairs(rectangle(responses), rectangle(other.sets[name]), one, other))
        for name, responses in one.sets.items()
    }


def pairs(ours: Rows, theirs: Rows, one: Side, other: Side) -> tuple[Rows, Rows]:
    """Return the responses of both to the same problems, in the same order.

    Problems are the same if prompt and answer are; where several are, they are paired in order.
    Raises UserError, with the problem's origin, where a problem has no partner.
    """
    mine, yours = numbered(ours), numbered(theirs)
    for found, known, side, without in ((mine, yours, one, other), (yours, mine, other, one)):
        for key, row in found.items():
            if key not in known:
                first = row[0]
                asked = any(question == first.question for question, _, _ in known)
                what = f"answer {first.answer!r}" if asked else "question"
                raise UserError(
                    f"{without.name}: not the {what} of {first.origin} in {side.name}; a "
                    "comparison needs the same problems on both sides"
                )
    return list(mine.values()), [yours[key] for key in mine]


def numbered(rows: Rows) -> dict[Problem, list[Graded]]:
    """Return the responses by problem."""
    count: dict[tuple[str, str], int] = {}
    found = {}
    for row in rows:
        key = row[0].question, row[0].answer
        found[*key, count.get(key, 0)] = row
        count[key] = count.get(key, 0) + 1
    return found


def difference(ours: Rows, theirs: Rows) -> Figures:
    """Return the difference of avg@k (ours less theirs) with its paired figures.

    Its 95 % interval and the p value of "both are equally good" (`statistics.sign_flip_p`) are
    clustered by question; `better` and `worse` count the questions on which ours scores more, and
    less.
    """
    right, wrong = _correct(ours), _correct(theirs)
    scores = right / len(ours[0]) - wrong / len(theirs[0])
    questions = np.unique([row[0].question for row in ours], return_inverse=True)[1]
    # Whole numbers: equal scores must be equal in every digit.
    scale = math.lcm(len(ours[0]), len(theirs[0]))
    parts = right * (scale // len(ours[0])) - wrong * (scale // len(theirs[0]))
    by_question = by_cluster(parts, questions)
    return {
        "difference": float(scores.mean()),
        "interval_95": interval_95(scores, questions),
        "p": sign_flip_p(by_question),
        "questions": len(by_question),
        "better": int((by_question > 0).sum()),
        "worse": int((by_question < 0).sum()),
    }


def _correct(rows: Rows) -> np.ndarray:
    """Return the number of correct responses to each problem."""
    return np.asarray([sum(each.correct for each in row) for row in rows], np.int64)
