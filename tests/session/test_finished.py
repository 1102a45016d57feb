"""The models of a finished run, used again: the same grades, and answers in order."""

import json

import pytest

from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.finished import evaluate_model, open_model
from fireopd_jax.training.run import train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
SETTINGS = [
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    f"student.architecture={MODEL}",
    "student.sft={steps: 60, batch_size: 32, optim: {learning_rate: 1e-2}}",
    f"teacher.architecture={MODEL}",
    "run.steps=1",
    "eval.problems=16",
    "eval.samples=2",
    "eval.batch_size=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(load_config([*SETTINGS, f"run.dir={folder}"]))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i + 1}"} for i in range(5)]
    rows.append({"prompt": [{"role": "user", "content": "9+9"}]})
    rows.append(
        {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1"}]}
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answers(folder, prompts, out, model="student", slots=4, **changed):
    settings = GenerateOptions(**{"max_tokens": 12} | changed)
    generate_to_file(str(folder), prompts, out, settings, name=model, slots=slots)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_a_grade_is_reproduced(run):
    folder, summary = run
    assert evaluate_model(folder, "student", []) == summary["student_after"]
    assert evaluate_model(folder, "student_start", []) == summary["student_before"]
    assert evaluate_model(folder, "teacher_default", []) == summary["teacher"]
    assert summary["student_after"]["mean_length"] < 16  # the supervised student has learnt to stop


def test_only_the_evaluation_may_be_changed(run):
    folder, _ = run
    figures = evaluate_model(folder, "student", ["eval.samples=3", "eval.temperature=0"])
    assert "avg@3" in figures
    with pytest.raises(UserError, match=r"run\.seed=3: only eval\.\*"):
        evaluate_model(folder, "student", ["run.seed=3"])
    with pytest.raises(UserError, match=r"eval\.smaples"):
        evaluate_model(folder, "student", ["eval.smaples=3"])
    with pytest.raises(UserError, match=r"eval\.problems=0"):
        evaluate_model(folder, "student", ["eval.problems=0"])


def test_answers_come_in_the_order_of_the_prompts(run, prompts, tmp_path):
    folder, _ = run
    rows = answers(folder, prompts, tmp_path / "out.jsonl", samples=2)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    asked[5] = "9+9"
    assert [row["prompt"] for row in rows] == [text for text in asked for _ in range(2)]
    assert [row["sample"] for row in rows] == [0, 1] * len(asked)
    for row in rows:
        assert set(row) == {"prompt", "text", "sample", "token_ids", "logprobs", "finish"}
        assert 0 < len(row["token_ids"]) == len(row["logprobs"]) <= 12
        assert all(value <= 0 for value in row["logprobs"])
        assert row["finish"] == "stop" or len(row["token_ids"]) == 12
    assert any(row["finish"] == "stop" for row in rows)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch_but_on_the_seed(run, prompts, tmp_path):
    folder, _ = run

    def ids(name, **changed):
        rows = answers(folder, prompts, tmp_path / name, **changed)
        return [row["token_ids"] for row in rows]

    first = ids("a")
    assert ids("b", slots=3) == first
    assert ids("c", seed=1) != first
    greedy = ids("d", temperature=0.0)
    assert ids("e", temperature=0.0, seed=1) == greedy
    assert ids("f", top_p=1e-6) == greedy


def test_nothing_is_overwritten(run, prompts, tmp_path):
    folder, _ = run
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        answers(folder, prompts, out)
    assert out.read_text() == "mine"


def test_the_folder_of_the_answers_is_made(run, prompts, tmp_path):
    folder, _ = run
    assert len(answers(folder, prompts, tmp_path / "new" / "out.jsonl")) == 7


def test_an_unknown_model_is_answered_by_those_there_are(run, prompts, tmp_path):
    folder, _ = run
    with pytest.raises(UserError) as caught:
        answers(folder, prompts, tmp_path / "out.jsonl", model="studnet")
    assert "'studnet'" in str(caught.value) and "did you mean 'student'" in str(caught.value)
    assert "student, student_start, teacher_default" in str(caught.value)
    with pytest.raises(UserError, match="no finished model"):
        open_model(tmp_path, "student")


def test_prompts_of_any_length_are_answered(run, tmp_path):
    folder, _ = run
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "x" * 600}) + "\n")
    rows = answers(folder, file, tmp_path / "out.jsonl")
    assert [len(row["prompt"]) for row in rows] == [1, 600]


def test_a_teacher_is_graded_as_the_run_graded_it(run):
    folder, summary = run
    again = evaluate_model(folder, "teacher_default", [])
    assert again == summary["teacher"]


def test_only_problems_that_were_held_out_are_graded(run):
    folder, _ = run
    with pytest.raises(UserError, match=r"eval\.problems=17: expected 1 to "):
        evaluate_model(folder, "student", ["eval.problems=17"])
