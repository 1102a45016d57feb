"""`data.grader` reaches every place that grades, and rows of built-in tasks keep their rule."""

import json

import jax
import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.graders import grade
from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.completions import Texts, on_host, write_completions
from fireopd_jax.session.described import unreadable_answers
from fireopd_jax.session.host import correct
from fireopd_jax.session.session import grade as evaluated
from fireopd_jax.session.setup import set_up
from fireopd_jax.text.chat import decode
from fireopd_jax.text.pieces import Pieces
from tests import cases

ANSWERS = ["0.5", r"\frac{1}{2}", "7", "B", r"\frac{1}{"]
RESPONSES = [r"\boxed{1/2}", r"\boxed{.5}", r"\boxed{8}", "The answer is (B).", "so 1/2"]
GRADES = {
    "math": [1, 1, 0, 1, 0],
    "exact": [0, 0, 0, 0, 0],
    "choice": [0, 0, 0, 1, 0],
    "operator.ne": [1, 1, 1, 1, 1],
}


def make_setup(folder, kind, *settings):
    file = folder / "rows.jsonl"
    rows = [{"prompt": f"Question {i}", "answer": answer} for i, answer in enumerate(ANSWERS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return set_up(
        load_config(
            ["smoke", f"data.path={file}", f"data.grader={kind}", "eval.problems=0", *settings]
        )
    )


def make_rollout(setup):
    tokenizer = setup.student.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in RESPONSES]
    mask = np.zeros((8, max(map(len, ids))), bool)
    tokens = np.zeros(mask.shape, np.int32)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    rollout = cases.make_rollout(mask)
    object.__setattr__(rollout, "tokens", tokens)
    object.__setattr__(rollout.prompts, "row", np.array([0, 1, 2, 3, 4, -1, -1, -1], np.int32))
    return rollout


@pytest.mark.parametrize("kind", GRADES)
def test_rollouts_are_graded_by_the_kind_of_the_run(kind, tmp_path):
    setup = make_setup(tmp_path, kind)
    np.testing.assert_array_equal(correct(setup, make_rollout(setup))[:5], GRADES[kind])


@pytest.mark.parametrize("kind", GRADES)
def test_evaluations_keep_which_rule_decided(kind, tmp_path):
    setup = make_setup(tmp_path, kind)
    rollout, rows = make_rollout(setup), np.arange(5)

    def draw(prompts, sampling):
        drawn = [int(row) if row >= 0 else 5 for row in prompts.row]
        return jax.tree.map(lambda leaf: np.asarray(leaf)[drawn], rollout)

    out = tmp_path / "eval.jsonl"
    result = evaluated(setup, setup.student, draw, rows, 1, lambda rows: None, out)
    lines = {line["row"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert [int(lines[i]["correct"]) for i in range(5)] == GRADES[kind]
    assert [each.correct for each in result] == [bool(grade) for grade in GRADES[kind]]
    if kind == "math":
        assert lines[0]["rule"] == "box: number" and lines[0]["plain"] is True
        assert lines[3]["rule"] == "phrase: choice"
    if kind == "operator.ne":
        assert lines[0]["rule"] == "operator.ne" and lines[0]["plain"] is None


def test_completions_keep_which_rule_decided(tmp_path):
    setup = make_setup(tmp_path, "math")
    rollout = make_rollout(setup)
    scores = cases.make_scores(*np.zeros((4, *rollout.mask.shape), np.float32))
    batch, keep = cases.assembled(rollout, scores, KeepAll(), Uniform(), "seq", 2)
    file = tmp_path / "step.parquet"
    spec = setup.student
    texts = Texts(
        setup.rows, ("a", "b"), lambda ids: decode(spec.tokenizer, ids), Pieces(spec.tokenizer),
        setup.grader,
    )  # fmt: skip
    write_completions(file, on_host(batch), np.asarray(keep), texts)
    table = {line["row"]: line for line in pyarrow.parquet.read_table(file).to_pylist()}
    assert [int(table[i]["correct"]) for i in range(5)] == GRADES["math"]
    assert table[0]["rule"] == "box: number" and table[0]["plain"] is True
    assert table[2]["plain"] is False


def test_rows_of_built_in_tasks_keep_their_rule():
    setup = set_up(load_config(["smoke"]))
    assert setup.grader(0) == "built-in task"
    answer = setup.rows[0].answer
    assert answer is not None and not grade(f"x = {answer}", answer, setup.grader(0))


def test_gold_answers_that_no_response_can_match_are_listed(tmp_path):
    line = unreadable_answers(make_setup(tmp_path, "math"))
    assert line.startswith("data: 1 gold answers that no response can match: ")
    assert line.endswith("rows.jsonl:5 (its brackets do not match)")
    assert "4 gold answers" in unreadable_answers(make_setup(tmp_path, "choice"))
    assert unreadable_answers(make_setup(tmp_path, "exact")) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.grader=maths"], r"data.grader=maths: expected math, .*did you mean 'math'"),
        (["data.grader=no_such.grader"], "data.grader: 'no_such.grader' cannot be imported"),
        (
            ["method/omniopd", "method.refine.similarity={kind: grader}", "data.grader=code"],
            "data.grader=code: method.refine.similarity.kind=grader compares final answers",
        ),
    ],
)
def test_a_wrong_grader_is_one_line(settings, message):
    with pytest.raises(UserError, match=message) as error:
        set_up(load_config(["smoke", *settings]))
    assert "\n" not in str(error.value)


def test_a_response_that_the_data_begins_is_graded_as_a_whole(tmp_path):
    file = tmp_path / "rows.jsonl"
    begun = [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": r"It is \boxed{"},
    ]
    file.write_text(json.dumps({"prompt": begun, "answer": "5"}) + "\n")
    setup = set_up(load_config(["smoke", f"data.path={file}", "eval.problems=0"]))
    assert setup.rows[0].begun
    ids = setup.student.tokenizer("5}, and 3 more", add_special_tokens=False)["input_ids"]
    rollout = cases.make_rollout(np.ones((1, len(ids)), bool))
    object.__setattr__(rollout, "tokens", np.array([ids], np.int32))
    object.__setattr__(rollout.prompts, "row", np.zeros(1, np.int32))
    assert correct(setup, rollout).tolist() == [1]
