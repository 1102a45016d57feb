"""Results are those of the run's summary and of paired comparisons."""

import pytest

from fireopd_jax.evaluation.comparison import Side, compare
from fireopd_jax.evaluation.responses import read_responses
from fireopd_jax.report.answers import answers
from fireopd_jax.report.reading import RunFiles
from fireopd_jax.report.results import command, results
from tests.report.made import evaluate, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return RunFiles(make_run(tmp_path_factory.mktemp("runs") / "made"))


def test_models_come_in_order_with_their_figures(run):
    (found,) = results(run)
    rows = {row["model"]: row["value"] for row in found["rows"]}
    assert rows == {"student before": 0.25, "student after": 0.625, "teacher": 0.875}
    assert found["rows"][0]["metric"] == "avg@2" and found["set"] == "held-out problems"


@pytest.mark.parametrize("distinct", [8, 5], ids=["", "equal problems"])
def test_differences_are_those_of_fireopd_eval(distinct, tmp_path):
    run = RunFiles(make_run(tmp_path / "made"))
    for label, share in (("student_before", 0.25), ("student_after", 0.625)):
        evaluate(run.path, label, share, distinct=distinct)
    evaluate(run.path, "teacher_default", 0.875, distinct=distinct)
    (found,) = results(run)
    assert [pair["against"] for pair in found["pairs"]] == ["student before", "teacher"]
    sides = [Side(name, read_responses(run.path / "eval" / f"{name}.jsonl"))
             for name in ("student_after", "student_before")]  # fmt: skip
    expected = compare(*sides)["held_out"]
    pair = found["pairs"][0]
    assert {key: pair[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert pair["difference"] == 0.375 and (pair["better"], pair["worse"]) == (3, 0)
    assert pair["questions"] == distinct


def test_teachers_are_compared_on_their_own_problems(tmp_path):
    made = make_run(tmp_path / "x")
    (made / "eval" / "teacher_default.json").unlink()
    (made / "eval" / "teacher_default.jsonl").unlink()
    (made / "summary.json").unlink()
    evaluate(made, "teacher_a%2Fb", 1.0, problems=4)
    evaluate(made, "teacher_c", 0.5, problems=8)
    (found,) = results(RunFiles(made))
    models = ["student before", "student after", "teacher a/b", "teacher c"]
    assert [row["model"] for row in found["rows"]] == models
    questions = {pair["against"]: pair["questions"] for pair in found["pairs"]}
    assert questions == {"student before": 8, "teacher a/b": 4, "teacher c": 8}


def test_answers_begin_with_those_that_changed(run):
    found = answers(run)
    assert found["models"] == ["student before", "student after", "teacher"]
    first = found["problems"][0]
    verdicts = [first["answers"][name][1] for name in found["models"][:2]]
    assert verdicts == [False, True]
    assert [(step[0], step[2]) for step in first["steps"]] == [(0, False), (6, True)]


def test_a_command_is_as_it_was_typed():
    assert (
        command(["/x/fireopd_jax/__main__.py", "train", "a b.yaml"]) == "fireopd train 'a b.yaml'"
    )
    assert command(["/usr/bin/fireopd", "train"]) == "fireopd train"
    assert command(None) is None and command([]) is None
