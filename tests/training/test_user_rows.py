"""Rows of a user: a run to its end, and every mistake in them in one line."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from tests.training.test_training import BASE, MODEL, NO_EVAL, ONE, run


def gsm8k(number):
    """Rows in the form of GSM8K: some questions are too long."""
    for i in range(number):
        tail = " Explain." * 20 if i % 5 == 0 else ""
        yield {
            "question": f"Ann has {i} pens and buys {i + 3}. How many?{tail}",
            "answer": f"She has {i} + {i + 3} = <<{i}+{i + 3}={2 * i + 3}>>{2 * i + 3}\n"
            f"#### {2 * i + 3}",
        }


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
def test_rows_of_a_user_run_to_the_end(tmp_path, kind):
    rows = list(gsm8k(20))
    file = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    summary = run(
        tmp_path / "run", *BASE, f"teacher.architecture={MODEL}", f"data.path={file}",
        "data.prompt_column=question", "data.answer_column=answer", "data.max_prompt_tokens=96",
        "run.steps=2", "eval.problems=4", "eval.samples=2", "eval.batch_size=8",
    )  # fmt: skip
    assert summary["student_after"]["problems"] <= 4
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert "4 prompts longer than 96 tokens dropped" in log
    assert "parameters are random" in log
    table = pyarrow.parquet.read_table(
        tmp_path / "run" / "completions" / "step_000002.parquet"
    ).to_pylist()
    assert len(table) == 8
    for row in table:
        source = rows[row["row"]]
        assert row["prompt"] == source["question"] and row["answer"] == source["answer"]
        count = len(row["tokens"])
        assert count == len(row["weight"]) == len(row["teacher_logprob"]) > 0
        assert np.mean(row["weight"]) == pytest.approx(1, abs=1e-4)
        assert row["teacher_score"] == pytest.approx(np.mean(row["teacher_logprob"]), rel=1e-5)


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (['{"prompt": "a"}', "{"], [], r"rows.jsonl:2: malformed JSON"),
        (['{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": ""}'], [], r"rows.jsonl:3: .*empty"),
        (
            ['{"prompt": "a"}', '{"prompt": "bbbbbbbbb"}', '{"prompt": "c"}'],
            ["data.overlong=error", "data.max_prompt_tokens=8"],
            r"rows.jsonl:2: the prompt has .* tokens, over data.max_prompt_tokens=8",
        ),
        (
            ['{"prompt": "abcdefghi"}', '{"prompt": "abcdefghj"}'],
            ["data.max_prompt_tokens=8"],
            r"none of 2 prompts fits",
        ),
        (['{"prompt": "a"}', '{"text": "b"}'], [], r"rows.jsonl:2: no column 'prompt'"),
        (
            ['{"prompt": "a"}', '{"prompt": "b"}'],
            ["eval.problems=1"],
            r"rows.jsonl:\d: no answer to grade by",
        ),
        (['{"prompt": "a"}'], ["mesh.data=9"], r"mesh.data: 9 devices asked for, 8 found"),
        (['{"prompt": "a"}'], ["mesh.data=3"], r"rollout.batch_size=8 is not divisible"),
        (['{"prompt": "a"}'], ["student.path=nowhere"], r"nowhere: no such folder"),
    ],
)
def test_mistakes_in_rows_and_models_are_one_line(tmp_path, rows, settings, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(row + "\n" for row in rows))
    base = [text for text in BASE if not text.startswith("student.")]
    if not any(text.startswith("eval.") for text in settings):
        settings = [*settings, NO_EVAL]
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", *base, "teacher={}", f"data.path={file}", *settings)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_data_leaves_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="no file"):
        run(tmp_path / "run", *ONE, f"data.path={tmp_path}/none.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_rows_is_refused(tmp_path):
    teachers = f"teachers={{addition: {{architecture: {MODEL}}}, idle: {{architecture: {MODEL}}}}}"
    with pytest.raises(UserError, match=r"teachers\.idle: no row is routed to it"):
        run(tmp_path / "run", *BASE, teachers, "data.teacher_column=domain", NO_EVAL)
