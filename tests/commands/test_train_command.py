"""`fireopd train --dry-run` checks all that needs no weights, and writes nothing."""

import json

import pytest
import yaml

from fireopd_jax.config import UserError
from fireopd_jax.recipe.difference import difference
from fireopd_jax.recipe.schema import Config, as_tree, load_config, load_sections
from fireopd_jax.runs.folder import open_run
from tests.commands.calling import call

FILES = ["quickstart_omniopd", "quickstart_opsd", "model/qwen3_4b_math_code_to_4b", "method/tip"]
SMOKE = ["smoke", "data.path=rows.jsonl"]


@pytest.fixture(autouse=True)
def rows(monkeypatch, tmp_path):
    """Work in a folder with a file of few rows."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("file", FILES)
def test_what_differs_from_the_defaults_loads_to_the_same(tmp_path, file):
    config = load_sections([file])
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump(difference(config), sort_keys=False))
    assert load_sections([str(written)]) == config


def test_sections_of_another_kind_and_named_ones_load_to_the_same(tmp_path):
    config = load_sections(
        [
            "smoke",
            "method.filter={kind: all_of, filters: [{kind: keep_all}, {kind: teacher_quantile}]}",
            "method.loss={kind: vocabulary_divergence}",
            "rollout.cache={kind: paged, page_size: 32}",
            "student.lora={rank: 3}",
            'teachers."a b"={path: x}',
            "teachers.c={}",
        ]
    )
    written = tmp_path / "written.yaml"
    found = difference(config)
    written.write_text(yaml.safe_dump(found, sort_keys=False))
    assert load_sections([str(written)]) == config
    assert found["teachers"]["c"] == {} and found["rollout"]["cache"]["kind"] == "paged"


def test_of_the_defaults_nothing_differs():
    assert difference(Config()) == {}


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_dry_run_prints_what_differs_and_what_it_would_do(monkeypatch, capsys, tmp_path, command):
    settings = [*SMOKE, "optim.learning_rate=3e-5", "rollout.group_size=8"]
    assert call(monkeypatch, command, "--dry-run", *settings) == 0
    printed = capsys.readouterr()
    file = tmp_path / "printed.yaml"
    file.write_text(printed.out)
    assert load_config([str(file)]) == load_config(settings)
    assert yaml.safe_load(printed.out)["optim"] == {"learning_rate": 3e-5}
    assert "seed" not in printed.out
    said = printed.err.splitlines()
    assert any("27,008 parameters" in line for line in said)
    assert "rows: 40, 24 to train on, 16 held out, 0 dropped" in said
    would = {
        "train": "would run 12 steps of 16 responses to 2 prompts (1 epochs); up to 1,024 "
        "tokens a step; and write runs/smoke (with a number if it exists)",
        "sft": "would train on references only, and write runs/smoke (with a number if it exists)",
    }
    assert said[-1] == would[command]
    assert names(tmp_path) == ["printed.yaml", "rows.jsonl"]


def test_in_full_it_prints_every_key(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "train", "--dry-run", "--full", *SMOKE) == 0
    whole = json.loads(json.dumps(as_tree(load_config(SMOKE))))
    assert yaml.safe_load(capsys.readouterr().out) == whole


def refused(monkeypatch, capsys, *settings):
    """Return the one line that a dry run is refused with."""
    assert call(monkeypatch, "train", "--dry-run", *SMOKE, *settings) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    return printed.err.splitlines()[-1]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("data.path=nowhere.jsonl", "no file 'nowhere.jsonl'"),
        ("student.path=nowhere", "nowhere"),
        ("run.name=a/b", "run.name"),
        ("rollout.batch_size=12", "rollout.batch_size=12 is not divisible"),
        ("data.max_prompt_tokens=2", "prompt"),
        ("teachers.second={}", "data.teacher_column: with 2 teachers"),
    ],
)
def test_files_tokenizers_and_routes_are_checked(monkeypatch, capsys, tmp_path, setting, words):
    assert words in refused(monkeypatch, capsys, setting)
    assert names(tmp_path) == ["rows.jsonl"]


def test_the_folder_of_the_run_is_checked(monkeypatch, capsys, tmp_path):
    config = load_config([*SMOKE, "run.dir=here"])
    open_run(config.run, as_tree(config)).close()
    before = names(tmp_path / "here")
    assert "run.seed was 0, is now 3" in refused(monkeypatch, capsys, "run.dir=here", "run.seed=3")
    assert call(monkeypatch, "train", "--dry-run", *SMOKE, "run.dir=here") == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("and write here, where it resumes")
    (tmp_path / "here" / "summary.json").write_text("{}")
    assert call(monkeypatch, "train", "--dry-run", *SMOKE, "run.dir=here") == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("nothing: here is complete")
    after = names(tmp_path / "here")
    assert after == sorted([*before, "summary.json"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "thesis.tex" in refused(monkeypatch, capsys, "run.dir=other")
    assert "not a folder" in refused(monkeypatch, capsys, "run.dir=other/thesis.tex")


def test_full_needs_a_dry_run(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--full", "smoke") == 2
    assert "--full: only with --dry-run" in capsys.readouterr().err


def test_the_first_line_names_versions_and_devices(monkeypatch, capsys, tmp_path):
    """It comes before anything is read, so that a slow disk is no silence."""

    def stop(settings):
        raise UserError("later")

    monkeypatch.setattr("fireopd_jax.recipe.schema.load", stop)
    assert call(monkeypatch, "train", "smoke") == 2
    first = capsys.readouterr().out
    assert first.startswith("fireopd ") and "jax " in first and "8 × cpu (" in first
    assert first.count("\n") == 1
