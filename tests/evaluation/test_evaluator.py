"""avg@k over problems, and the JSON line of each response."""

import json

import numpy as np
import pytest

from fireopd_jax.evaluation.evaluator import EvalResult, evaluate
from fireopd_jax.types import Prompts
from tests import cases


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


def test_grades_are_averaged_by_problem_and_padding_is_left_out(tmp_path):
    batches = [make_prompts([0, 0, 1, 1]), make_prompts([2, 2, -1, -1])]
    advanced = []
    result = evaluate(
        answer, batches, lambda ids: f"#### {ids[0]}", str, 2,
        advance=advanced.append, out=tmp_path / "new" / "a.jsonl",
    )  # fmt: skip
    assert result.scores == (1.0, 0.0, 1.0)
    assert result.mean == pytest.approx(2 / 3)
    assert result.interval == pytest.approx(1.96 * np.std([1, 0, 1], ddof=1) / np.sqrt(3))
    assert result.summary() == {
        "avg@2": result.mean,
        "interval_95": result.interval,
        "problems": 3,
        "mean_length": 2.0,
        "finished": pytest.approx(4 / 6),
    }
    assert advanced == [1, 1]
    lines = [json.loads(x) for x in (tmp_path / "new" / "a.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert lines[2] == {"row": 1, "response": "#### 9", "answer": "1", "correct": False}


def test_no_problem_has_no_grade():
    result = evaluate(answer, [], str, str, 2)
    assert result.scores == () and np.isnan(result.mean) and np.isnan(result.interval)
    assert result.summary()["problems"] == 0


def test_one_problem_has_no_interval():
    one = EvalResult(samples=1, scores=(1.0,), mean_length=1.0, finished=1.0)
    assert one.mean == 1.0 and np.isnan(one.interval)
