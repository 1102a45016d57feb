"""Runs that go on: with more steps, from another folder, after rows have moved or changed."""

import json

import pytest
import yaml

from fireopd_jax.commands.resume import resume, run_folder
from fireopd_jax.config import NothingLearnt, UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.finished import evaluate_model
from fireopd_jax.training.run import train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
BASE = [
    "mesh.data=1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=12",
    f"student.architecture={MODEL}",
    f"teacher.architecture={MODEL}",
    "optim.learning_rate=1e-3",
    "eval.problems=2",
    "eval.samples=1",
]
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)]


def write_rows(file, rows=ROWS):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, *settings, **options):
    return train(load_config([*BASE, *settings, f"run.dir={folder}"]), **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps without a break, and the folder of its rows."""
    home = tmp_path_factory.mktemp("straight")
    write_rows(home / "rows.jsonl")
    return home, run(home / "run", f"data.path={home}/rows.jsonl", "run.steps=4")


def test_a_complete_run_goes_on_to_the_bits_of_a_longer_one(
    straight, tmp_path, monkeypatch, capsys
):
    home, whole = straight
    monkeypatch.chdir(home)
    short = run(tmp_path / "run", "data.path=rows.jsonl", "run.steps=2")
    folder = tmp_path / "run"
    assert short["params_sha256"] != whole["params_sha256"]
    # From another working directory, by the folder alone.
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    resume("run", ["run.steps=4"], extend=False)
    shown = capsys.readouterr().out
    assert "run.steps was 2, is now 4" in shown and "student: resuming from step 2 of 4" in shown
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["params_sha256"] == whole["params_sha256"] and summary["steps"] == 4
    assert summary["student_after"] == whole["student_after"]
    before = json.loads((folder / "summary_step_000002.json").read_text())
    assert before["params_sha256"] == short["params_sha256"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["run"]["steps"] == 4 and config["data"]["path"] == f"{home}/rows.jsonl"
    # The student of the shorter run is still there, under another name.
    assert evaluate_model(folder, "student_step_000002", []) == short["student_after"]
    resume("run", [], extend=False)
    assert "nothing to do; fireopd resume run run.steps=N" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_may_move_but_not_change(straight, tmp_path):
    home, whole = straight
    folder, moved = tmp_path / "run", tmp_path / "moved.jsonl"
    run(folder, f"data.path={home}/rows.jsonl", "run.steps=2")
    write_rows(moved, [*ROWS[:-1], ROWS[-1] | {"answer": "11"}])
    with pytest.raises(UserError, match=r"^data\.path: these 6 rows are not those of"):
        resume(str(folder), ["run.steps=4", f"data.path={moved}"], extend=False)
    write_rows(moved)
    resume(str(folder), ["run.steps=4", f"data.path={moved}"], extend=False)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
def test_a_run_that_learns_nothing_fails_and_its_card_says_so(straight, tmp_path):
    home, _ = straight
    settings = [f"data.path={home}/rows.jsonl", "run.steps=4", "optim.learning_rate=1e38"]
    for limit, words in {20: "all 4 updates were skipped", 3: "the last 3 updates"}.items():
        folder = tmp_path / f"run_{limit}"
        with pytest.raises(NothingLearnt, match=words):
            run(folder, *settings, f"run.max_nonfinite={limit}")
        card = (folder / "README.md").read_text()
        assert "has learnt nothing" in card and words in card
        assert not (folder / "summary.json").exists()
    # What was done is kept: another process says the same at once.
    with pytest.raises(NothingLearnt, match="all 4 updates"):
        run(tmp_path / "run_20", *settings)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("x.yaml", "fireopd train x.yaml begins a run"),
        ("one/checkpoints", "fireopd resume one"),
        ("two", r"did you mean runs/two\?"),
    ],
)
def test_a_folder_that_is_no_run_is_named_with_the_nearest(tmp_path, monkeypatch, run, words):
    monkeypatch.chdir(tmp_path)
    for folder in ("one/checkpoints", "runs/two"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("one/config.yaml", "runs/two/config.yaml", "x.yaml"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=words):
        run_folder(run)


def test_a_run_without_its_configuration_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: empty; expected the configuration"):
        resume(str(tmp_path), [], extend=False)


@pytest.mark.parametrize("setting", ["run.dir=other", "other.yaml"])
def test_only_keys_are_changed_by_a_resume(tmp_path, setting):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=setting):
        resume(str(tmp_path), [setting], extend=False)
