"""Whole runs: equal bits when repeated, killed and resumed; every error in one line."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.config import NothingLearnt, UserError
from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.session.session import make_generate
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.run import sft, train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
SFT = "{steps: 4, batch_size: 8, save_every: 2, optim: {learning_rate: 3e-3}}"
BASE = [
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    "optim.learning_rate=1e-3",
    f"student.architecture={MODEL}",
    "run.save_every=2",
    "run.steps=6",
    "run.completions_every=3",
]
ONE = [*BASE, f"teacher.architecture={MODEL}", f"teacher.sft={SFT}"]
WHOLE = [
    *ONE,
    f"student.sft={SFT}",
    "run.compare=[opd]",
    "eval.problems=6",
    "eval.samples=2",
    "eval.batch_size=8",
    "eval.every=3",
    "eval.every_problems=4",
]
COMMAND = "from fireopd_jax.cli import main; main()"
# The process ends itself at one point of its work, so that no test depends on its speed.
KILL_AT_SAVE = """
import os, signal
from fireopd_jax.runs.checkpoints import Checkpoints
save = Checkpoints.save
def killing(self, step, *rest):
    save(self, step, *rest)
    if self.folder.parent.name == {place!r} and step >= {step}:
        if {whole}:
            self.close()
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = killing
"""
INTERRUPT_AT_STEP_2 = """
import os, signal
from fireopd_jax.training.distill import Distillation
score = Distillation.score
def interrupting(self, params, rollout, state):
    if int(state.updates) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return score(self, params, rollout, state)
Distillation.score = interrupting
"""
NO_EVAL = "eval.problems=0"


def run(folder, *settings):
    return train(load_config([*settings, f"run.dir={folder}"]))


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    """Steps that have the metrics of training, in the order of the file."""
    return [line["step"] for line in lines(folder) if "loss" in line]


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def command(folder, settings, before=""):
    """Run the command line in a process of its own, with as many devices.

    XLA has a thread for each, and another number of threads may round otherwise.
    """
    return subprocess.run(
        [sys.executable, "-c", before + COMMAND, "train", *settings, f"run.dir={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(folder, *WHOLE)


def test_a_run_leaves_what_it_promises(finished):
    folder, summary = finished
    for name in ("config.yaml", "env.json", "metrics.jsonl", "summary.json", "README.md"):
        assert (folder / name).is_file(), name
    for name in ("completions", "eval", "checkpoints", "logs"):
        assert any((folder / name).iterdir()), name
    assert summary == json.loads((folder / "summary.json").read_text())
    for key in ("teacher", "student_before", "student_after"):
        assert 0 <= summary[key]["avg@2"] <= 1 and summary[key]["problems"] == 6
    assert summary["steps"] == 6 and summary["seconds"] > 0
    assert len(summary["params_sha256"]) == 64
    assert set(summary["controls"]) == {"opd"}
    assert steps(folder) == steps(folder / "controls" / "opd") == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(folder) if "eval/held_out/avg@1" in line] == [0, 3, 6]
    assert "avg@2" in (folder / "README.md").read_text()
    names = {path.name for path in (folder / "models").iterdir()}
    assert names == {
        "teacher_default",
        "student_start",
        "student",
        "opd",
        "fit.json",
        "sources.json",
        "templates.json",
    }


def test_steps_learn_and_nothing_is_skipped(finished):
    folder, _ = finished
    trained = [line for line in lines(folder) if "loss" in line]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in trained)
    assert all(abs(line["policy/log_ratio_max"]) < 1e-4 for line in trained)
    assert all(0.5 < line["method/keep_fraction"] < 1 for line in trained)


def test_the_seconds_of_each_stage_are_in_the_metrics(finished):
    folder, _ = finished
    trained = [line for line in lines(folder) if "loss" in line]
    for line in trained:
        assert {f"timing_s/{name}" for name in ("rollout", "score", "update", "step")} <= set(line)
        assert all(line[key] >= 0 for key in line if key.startswith("timing_s/"))
        # On one device, one after the other: together they take no longer than the step.
        parts = sum(line[f"timing_s/{name}"] for name in ("rollout", "score", "update"))
        assert 0 < parts <= line["timing_s/step"] + 1.0
    # Programs are compiled before the first step.
    assert trained[0]["timing_s/compile"] == 0 and trained[0]["timing_s/eval"] > 0
    # Evaluated and saved after step 3, saved after steps 2 and 4.
    assert [line["step"] for line in trained if line.get("timing_s/eval")] == [1, 4]
    assert [line["step"] for line in trained if line.get("timing_s/save")] == [3, 4, 5]
    log = (folder / "logs" / "run.log").read_text()
    assert re.search(r"student: .*rollout [\d.]+ s", log)


def test_nothing_compiles_in_any_step(finished):
    folder, _ = finished
    counts = [line["perf/compilations"] for line in lines(folder) if "loss" in line]
    assert counts == [0] * 6


def test_evaluations_saves_and_reports_compile_once(tmp_path, monkeypatch):
    counter, seen = CompileCounter(), []
    after = Distillation.after

    def counted(self, done, state, stopping):
        after(self, done, state, stopping)
        seen.append(counter.count)

    made = []

    def recorded(*about):
        made.append(make_generate(*about))
        return made[-1]

    monkeypatch.setattr(Distillation, "after", counted)
    monkeypatch.setattr("fireopd_jax.session.session.make_generate", recorded)
    every = ["run.save_every=1", "eval.every=1", "eval.every_problems=4", "eval.problems=4"]
    run(tmp_path / "run", *ONE, *every, "run.steps=5")
    assert len(seen) == 5 and seen[1] == seen[4]
    # Teacher and student are of one architecture: one program draws for evaluations and steps.
    assert [draw._cache_size() for draw in made] == [1]


@pytest.mark.slow
def test_the_same_configuration_gives_the_same_bits(finished, tmp_path):
    _, summary = finished
    again = run(tmp_path / "again", *WHOLE)
    assert again["params_sha256"] == summary["params_sha256"]
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    other = run(tmp_path / "other", *ONE, NO_EVAL, "run.seed=1")
    assert other["params_sha256"] != summary["params_sha256"]


def test_a_complete_run_is_left_alone(finished, capsys):
    folder, summary = finished
    before = files(folder)
    assert run(folder, *WHOLE) == summary
    assert "complete" in capsys.readouterr().out
    assert files(folder) == before


def test_another_configuration_is_refused_with_its_key(finished):
    folder, _ = finished
    before = files(folder)
    with pytest.raises(UserError, match=r"run\.seed was 0, is now 7"):
        run(folder, *WHOLE, "run.seed=7")
    with pytest.raises(UserError, match=r"run\.seed was 0, is now 7"):
        run(folder, *WHOLE, "run.seed=7", "run.resume=never")
    assert files(folder) == before


@pytest.mark.kill
@pytest.mark.parametrize(
    ("place", "step", "whole"),
    [
        pytest.param("student_start", 2, True, id="in supervised training", marks=pytest.mark.slow),
        pytest.param("run", 2, True, id="in distillation", marks=pytest.mark.slow),
        pytest.param("run", 4, False, id="while it saves", marks=pytest.mark.slow),
        pytest.param("opd", 3, True, id="in the control", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path, place, step, whole):
    _, summary = finished
    folder = tmp_path / "run"
    killed = command(folder, WHOLE, KILL_AT_SAVE.format(place=place, step=step, whole=whole))
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert not (folder / "summary.json").exists()
    resumed = command(folder, WHOLE)
    assert resumed.returncode == 0, resumed.stdout
    assert f"resuming from step {step}" in resumed.stdout or not whole
    after = json.loads((folder / "summary.json").read_text())
    assert after["params_sha256"] == summary["params_sha256"]
    assert after["student_after"] == summary["student_after"]
    assert after["controls"] == summary["controls"]
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert len(lines(folder)) == len({(line["step"], "loss" in line) for line in lines(folder)})


@pytest.mark.slow
@pytest.mark.kill
def test_an_interrupted_run_saves_and_goes_on_to_the_same_bits(tmp_path):
    settings = [*ONE, NO_EVAL, "run.save_every=1000"]
    whole = run(tmp_path / "whole", *settings)
    folder = tmp_path / "run"
    interrupted = command(folder, settings, INTERRUPT_AT_STEP_2)
    assert interrupted.returncode == 130, interrupted.stdout
    assert (
        f"fireopd resume {folder}" in interrupted.stdout and "Traceback" not in interrupted.stdout
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["3"]
    with pytest.raises(UserError, match=r"run\.resume"):
        run(folder, *settings, "run.resume=never")
    assert run(folder, *settings)["params_sha256"] == whole["params_sha256"]
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_the_supervised_part_alone(tmp_path):
    config = load_config([*ONE, f"student.sft={SFT}", f"run.dir={tmp_path}/run", NO_EVAL])
    assert len(sft(config)["params_sha256"]) == 64
    assert {p.name for p in (tmp_path / "run" / "models").iterdir()} == {
        "teacher_default",
        "student_start",
        "fit.json",
        "sources.json",
        "templates.json",
    }
    sft_metrics = lines(tmp_path / "run" / "models" / "student_start")
    assert [line["step"] for line in sft_metrics] == [1, 2, 3, 4]
    assert sft_metrics[-1]["loss"] < sft_metrics[0]["loss"]
    # The run stays open: train goes on with these models.
    assert not (tmp_path / "run" / "summary.json").exists()
    whole = run(tmp_path / "whole", *ONE, f"student.sft={SFT}", NO_EVAL)
    assert train(config)["params_sha256"] == whole["params_sha256"]


def test_two_routed_teachers(tmp_path):
    both = [
        *BASE, "data.path=[builtin:addition-1, builtin:subtraction-1]",
        "data.teacher_column=domain", f"teachers.addition.architecture={MODEL}",
        f"teachers.subtraction.architecture={MODEL}", "run.steps=2", "eval.problems=8",
        "eval.samples=1", "eval.batch_size=8", "method.filter.scope=teacher",
        "method.reweight.max_scope=teacher",
    ]  # fmt: skip
    summary = run(tmp_path / "run", *both)
    assert set(summary["teacher"]) == {"addition", "subtraction"}
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "step_000002.parquet")
    for row in table.to_pylist():
        assert row["teacher"] == ("addition" if "+" in row["prompt"] else "subtraction")
    wrong = [text.replace("teachers.subtraction", "teachers.substraction") for text in both]
    with pytest.raises(UserError, match=r"'subtraction'; known are addition, substraction"):
        run(tmp_path / "wrong", *wrong)


def test_a_run_in_which_everything_is_dropped_says_so(tmp_path):
    settings = [*ONE, NO_EVAL, "run.steps=2", "run.updates_per_rollout=2"]
    config = load_config([*settings, f"run.dir={tmp_path / 'run'}"])
    method = dataclasses.replace(config.method, filter=TeacherQuantile(drop_fraction=1.0))
    with pytest.raises(NothingLearnt, match="all 4 updates were skipped: no token is left"):
        train(dataclasses.replace(config, method=method))
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [1, 1]
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert "step 2 skipped: no token is left to train on" in log
    assert "4 of 4 updates were skipped" in log


@pytest.mark.slow
def test_a_student_from_another_run_and_answers_of_the_teacher(finished, tmp_path):
    folder, _ = finished
    summary = run(
        tmp_path / "run", *ONE, NO_EVAL, f"student.path={folder}/models/student_start",
        f"teacher.path={folder}/models/teacher_default", "run.steps=1",
        f"student.sft={SFT}", "student.sft.source=teacher", "student.sft.teacher_rows=32",
        "eval.batch_size=8",
    )  # fmt: skip
    assert summary["params_sha256"]


@pytest.mark.slow
def test_supervised_training_that_ends_by_its_loss_resumes_to_the_same_bits(tmp_path):
    sft = "{steps: 40, batch_size: 8, save_every: 3, stop_loss: 4.5, optim: {learning_rate: 1e-2}}"
    settings = [*ONE, f"student.sft={sft}", NO_EVAL]
    whole = run(tmp_path / "whole", *settings)
    ended = len(lines(tmp_path / "whole" / "models" / "student_start"))
    assert 11 <= ended < 40
    folder = tmp_path / "run"
    last = ended - ended % 3
    kill = KILL_AT_SAVE.format(place="student_start", step=last, whole=True)
    assert command(folder, settings, kill).returncode == -signal.SIGKILL
    assert command(folder, settings).returncode == 0
    assert len(lines(folder / "models" / "student_start")) == ended
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["params_sha256"] == whole["params_sha256"]
