"""Figures of graded responses, and the JSON line of each response."""

import json

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import prompt_digest
from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation.evaluator import EvalResult, evaluate, sample
from fireopd_jax.evaluation.responses import (
    Grader,
    Problem,
    read_responses,
    write_responses,
)
from fireopd_jax.evaluation.verdict import Verdict
from fireopd_jax.types import Prompts
from tests import cases
from tests.evaluation.graded import responses

SAME = Grader(
    lambda text, row: Verdict(text == f"#### {row.answer}", "same"), lambda text, row: text[5:]
)


def make_prompts(row):
    row = np.asarray(row, np.int32)
    tokens = np.ones((len(row), 1), np.int32)
    length = (row >= 0).astype(np.int32)
    return Prompts(tokens, length, tokens, length, np.zeros_like(row), row, row, row)


def answer(prompts):
    """Return as response the row index in even rows, else 9; row 2 is cut off."""
    mask = np.repeat(prompts.length[:, None] > 0, 2, axis=1)
    rollout = cases.make_rollout(mask)
    digits = np.where(prompts.row % 2 == 0, prompts.row, 9)
    tokens = np.stack([digits, np.zeros_like(digits)], axis=1).astype(np.int32)
    object.__setattr__(rollout, "tokens", tokens)
    object.__setattr__(rollout, "finished", prompts.row != 2)
    return rollout


def problem(index):
    turns = ({"role": "user", "content": f"what is {index}?"},)
    return Problem(index, Row(turns, str(index), None, None, f"f:{index + 1}"))


def test_responses_are_sampled_graded_and_written_and_padding_is_left_out(tmp_path):
    batches = [make_prompts([0, 0, 1, 1]), make_prompts([2, 2, -1, -1])]
    advanced, out = [], tmp_path / "new" / "a.jsonl"
    drawn = sample(answer, batches, lambda ids: f"#### {ids[0]}", advanced.append)
    graded = evaluate(drawn, [problem(i) for i in range(3)], grader=SAME, name="s", out=out)
    assert advanced == [1, 1]
    assert [(each.row, each.sample) for each in graded] == [
        (i, j) for i in range(3) for j in (0, 1)
    ]
    figures = EvalResult.of(graded, 2).summary()
    assert figures["avg@2"] == pytest.approx(2 / 3) and figures["mean_length"] == 2
    assert figures["interval_95"] == pytest.approx(1.96 * np.std([1, 0, 1], ddof=1) / np.sqrt(3))
    assert figures["finished"] == pytest.approx(4 / 6)
    assert figures["truncated"] == pytest.approx(2 / 6)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[2] == {
        "row": 1, "response": "#### 9", "answer": "1", "correct": False, "sample": 0, "final": "9",
        "rule": "same", "plain": None, "tokens": 2, "finished": True, "set": "s",
        "question": prompt_digest(problem(1).row).hex()[:16], "origin": "f:2",
        "prompt": "what is 1?",
    }  # fmt: skip
    assert read_responses(out) == {"s": graded}


def test_the_grader_is_an_argument_and_its_rule_and_plain_verdict_are_kept():
    own = Grader(
        lambda text, row: Verdict(True, f"{text} for {row.answer}", False),
        lambda text, row: f"{text} {row.answer}",
    )
    (graded,) = evaluate(
        sample(answer, [make_prompts([1])], lambda ids: "ab"), [problem(1)], grader=own, name="s"
    )
    assert (graded.correct, graded.rule, graded.plain) == (True, "ab for 1", False)
    assert graded.final == "ab 1"
    figures = EvalResult.of([graded], 1).summary()
    assert figures["avg@1"] == 1 and figures["plain_avg@1"] == 0


def test_figures_of_several_samples():
    scores = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    finals = [["0", "x", "x", ""], ["y"] * 4, ["2"] * 4]
    figures = EvalResult.of(responses(scores, finals=finals), 4).summary()
    assert figures["avg@4"] == figures["pass@1"] == pytest.approx(1.25 / 3)
    assert figures["pass@2"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert figures["pass@4"] == pytest.approx(2 / 3)
    assert figures["maj@4"] == pytest.approx(1 / 3)
    assert figures["maj@4_interval_95"] == pytest.approx(1.96 * np.std([0, 0, 1], ddof=1) / 3**0.5)
    assert figures["interval_95"] == figures["pass@1_interval_95"]
    assert figures["mean_length"] == 20 and figures["problems"] == figures["questions"] == 3


def test_duplicates_count_as_one_question_in_the_interval_only():
    once = EvalResult.of(responses([[1], [0], [1]]), 1).summary()
    questions = ["a", "a", "b", "b", "c", "c"]
    twice = responses([[1], [1], [0], [0], [1], [1]], questions=questions)
    figures = EvalResult.of(twice, 1).summary()
    assert (figures["problems"], figures["questions"]) == (6, 3)
    assert figures["avg@1"] == once["avg@1"]
    assert figures["interval_95"] == pytest.approx(once["interval_95"])


def test_no_problem_has_no_grade_and_one_has_no_interval():
    none = EvalResult.of([], 2)
    assert none.summary()["problems"] == 0 and np.isnan(none.mean)
    assert np.isnan(none.summary()["interval_95"]) and "plain_avg@2" not in none.summary()
    one = EvalResult.of(responses([[1]]), 1).summary()
    assert one["avg@1"] == 1 and np.isnan(one["interval_95"])


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", r"a\.jsonl:3: not valid JSON"),
        ('{"row": 1}', r"a\.jsonl:3: no 'response'"),
        ("[]", r"a\.jsonl:3: no 'row'"),
        (None, r"a\.jsonl:3: row 0, sample 0 of s is there twice"),
    ],
)
def test_a_line_that_is_no_graded_response_is_named(tmp_path, line, words):
    file = tmp_path / "a.jsonl"
    write_responses(file, responses([[1], [0]]))
    first = file.read_text().splitlines()[0]
    file.write_text(file.read_text() + (line or first) + "\n")
    with pytest.raises(UserError, match=words):
        read_responses(file)


def test_a_grade_that_is_no_boolean_and_an_empty_file_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    write_responses(file, responses([[1]]))
    file.write_text(file.read_text().replace("true", '"yes"', 1))
    with pytest.raises(UserError, match=r"a\.jsonl:1: 'correct' is 'yes'"):
        read_responses(file)
    file.write_text("")
    with pytest.raises(UserError, match="holds no responses"):
        read_responses(file)


def test_a_problem_with_fewer_responses_than_others_is_named():
    graded = responses([[1, 0], [0, 0]])[:-1]
    with pytest.raises(UserError, match=r"1 responses to s\.jsonl:2, 2 to s\.jsonl:1"):
        EvalResult.of(graded, 2)
