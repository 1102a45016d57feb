"""`fireopd data`: what a run would make of its rows, before any run."""

import json

import pytest

from fireopd_jax.commands.data import divided, examine, show
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_sections
from fireopd_jax.text.tokenizer import byte_tokenizer


def write(folder, *records, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def rows(folder):
    return write(
        folder,
        {"problem": "1+1?", "answer": "2", "source": "gsm8k"},
        {"problem": "2+2?", "answer": "4", "source": "gsm8k"},
        {"problem": "1+1?", "answer": "3", "source": "code"},
        {"problem": "9+9?", "answer": None, "source": "code"},
        {"problem": "x" * 90, "answer": "5", "source": "code"},
    )


def model(folder):
    """A folder with a tokenizer and a configuration, and no weights: none are needed."""
    byte_tokenizer().save_pretrained(folder)
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 261,
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_columns_counts_and_problems_are_shown(tmp_path, capsys):
    path = rows(tmp_path)
    show([path, "eval.problems=2"], as_json=False)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"{path}: 5 rows, problem and answer columns: prompt=problem, answer=answer; not used: "
        "source"
    )
    assert out[1] == f"{path}: 1 rows have no answer; they are trained on, not held out"
    assert "5 rows: " in out[2] and "1 without an answer" in out[2] and "1 repeat an" in out[2]
    assert "characters of a prompt: least 4, median 4, p95 72, most 90" in out
    assert "user: 1+1?" in out
    assert out[-2:] == [
        "problems: 1",
        f"  one prompt, two answers: {path}:1 ('2') and {path}:3 ('3')",
    ]


def test_each_model_shows_a_prompt_and_its_lengths(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    settings = [
        f"data.path={rows(tmp_path)}", "eval.problems=1", "data.max_prompt_tokens=32",
        f"student.path={model(home)}", f"teachers.math.path={home}", f"teachers.code.path={home}",
        "data.teacher_column=source", "data.routes={gsm8k: math, '*': code}",
    ]  # fmt: skip
    found = examine(load_sections(settings))
    assert found.routes == {"math": 2, "code": 3}
    student, math, code = found.prompts
    assert student.text == "<|user|>1+1?<|end|><|assistant|>" and student.too_long == 1
    assert student.tokens == {"least": 7, "median": 7, "p95": 75, "most": 93}
    assert math.origin.endswith(":1") and math.tokens["most"] == 7
    assert code.origin.endswith(":3") and code.model == "teacher code"


def test_json_has_every_finding(tmp_path, capsys):
    show([rows(tmp_path), "eval.problems=256"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 5 and found["unanswered"] == 1 and found["prompts"] == []
    # More than there are rows.
    assert any("eval.problems=256: nothing is left" in problem for problem in found["problems"])


def test_answers_that_cannot_be_graded_are_listed(tmp_path):
    path = write(tmp_path, {"prompt": "a", "answer": "2"}, {"prompt": "b", "answer": "\\boxed{}"})
    found = examine(load_sections([f"data.path={path}", "eval.problems=0"]))
    assert found.problems == [
        f"{path}:2: the answer '\\\\boxed{{}}' cannot be graded: it has a mark without an answer"
    ]


def test_files_configurations_and_overrides_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jsonl").write_text("{}")
    given = ["a=b.jsonl", "*.parquet", "openai/gsm8k", "run.yaml", "quickstart", "data.split=test"]
    files, settings = divided(given)
    assert files == ["a=b.jsonl", "*.parquet", "openai/gsm8k"]
    assert settings == ["run.yaml", "quickstart", "data.split=test"]
    with pytest.raises(UserError, match="expected a file of rows, a configuration"):
        divided([])


def test_a_mistake_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"rows\.jsnl' is of an unknown kind.*did you mean 'rows\.jsonl'"
    ):
        show([rows(tmp_path).replace("jsonl", "jsnl")], as_json=False)
