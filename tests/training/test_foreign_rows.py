"""Data files in the shape of TRL's and verl's, through `fireopd data` and a run, unchanged."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.commands.data import examine
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_sections
from fireopd_jax.session.finished import evaluate_model
from tests.training.test_training import BASE, MODEL, NO_EVAL, run

TINY = [*BASE, f"teacher.architecture={MODEL}", "data.max_prompt_tokens=64", "run.steps=1"]
GKD = ["method/gkd", "rollout.on_policy_fraction=0.5"]


def verl(folder):
    """What verl's gsm8k.py writes."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{i}+{i}? Let's think step by step."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i, "answer": f"#### {2 * i}"},
        }
        for i in range(12)
    ]
    file = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def trl(folder, form):
    """TRL's conversational rows: prompt and completion, or messages."""
    file = folder / f"{form}.jsonl"
    with file.open("w") as out:
        for i in range(12):
            asked = [{"role": "user", "content": f"{i}+{i}?"}]
            told = [{"role": "assistant", "content": str(2 * i)}]
            both = {"prompt": asked, "completion": told}
            row = both if form == "completion" else {"messages": [*asked, *told]}
            out.write(json.dumps(row) + "\n")
    return file


def test_a_file_of_verl_runs_unchanged(tmp_path, monkeypatch):
    verl(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = "train.parquet"
    found = examine(load_sections([f"data.path={file}", "eval.problems=4"]))
    assert (found.rows, found.held_out, found.unanswered, found.problems) == (12, 4, 0, [])
    summary = run(
        tmp_path / "run", *TINY, f"data.path={file}", "eval.problems=4", "eval.samples=1",
        "eval.batch_size=8",
    )  # fmt: skip
    assert summary["student_after"]["problems"] == 4
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert (
        "verl's columns: prompt=prompt, answer=reward_model.ground_truth; not used: data_s" in log
    )

    # The run finds its rows from another folder, and takes no other rows for them.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate_model(tmp_path / "run", "student", [])["problems"] == 4
    moved = (tmp_path / file).rename(tmp_path / "moved.parquet")
    again = evaluate_model(tmp_path / "run", "student", [f"data.path={moved}"])
    assert again["problems"] == 4
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(12)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"these 12 rows are not those of .*data\.path=\.\.\."):
        evaluate_model(tmp_path / "run", "student", [f"data.path={tmp_path}/other.jsonl"])
    with pytest.raises(UserError, match=r"only eval\.\* keys, data.path and data.mixture"):
        evaluate_model(tmp_path / "run", "student", ["data.duplicates=drop"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["completion", "messages"])
def test_a_file_of_trl_runs_unchanged(tmp_path, form):
    file = trl(tmp_path, form)
    found = examine(load_sections([f"data.path={file}", "eval.problems=0"]))
    assert (found.rows, found.references, found.problems) == (12, 12, [])
    assert run(tmp_path / "run", *TINY, *GKD, f"data.path={file}", NO_EVAL)["steps"] == 1
