"""Whole runs: the same to the bit when repeated, killed and resumed; every mistake in one line."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
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
advance = Distillation.advance
def interrupting(self, state, step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return advance(self, state, step)
Distillation.advance = interrupting
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
    assert names == {"teacher_default", "student_start", "student", "opd"}


def test_steps_learn_and_nothing_is_skipped(finished):
    folder, _ = finished
    trained = [line for line in lines(folder) if "loss" in line]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in trained)
    assert all(abs(line["policy/log_ratio_max"]) < 1e-4 for line in trained)
    assert all(0.5 < line["fire/keep_fraction"] < 1 for line in trained)


def test_nothing_compiles_after_the_first_step(finished):
    folder, _ = finished
    counts = [line["perf/compilations"] for line in lines(folder) if "loss" in line]
    assert counts[0] > 0 and counts[1:] == [0] * 5


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
    with pytest.raises(UserError, match=r"run\.steps was 6, is now 7"):
        run(folder, *WHOLE, "run.steps=7")
    with pytest.raises(UserError, match=r"run\.steps was 6, is now 7"):
        run(folder, *WHOLE, "run.steps=7", "run.resume=never")
    assert files(folder) == before


@pytest.mark.kill
@pytest.mark.parametrize(
    ("place", "step", "whole"),
    [
        pytest.param("student_start", 2, True, id="in supervised training", marks=pytest.mark.slow),
        pytest.param("run", 2, True, id="in distillation"),
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
    assert f"goes on from step {step}" in resumed.stdout or not whole
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
        f"go on with run.dir={folder}" in interrupted.stdout
        and "Traceback" not in interrupted.stdout
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
    }
    sft_metrics = lines(tmp_path / "run" / "models" / "student_start")
    assert [line["step"] for line in sft_metrics] == [1, 2, 3, 4]
    assert sft_metrics[-1]["loss"] < sft_metrics[0]["loss"]
    # The run stays open: train goes on with these models.
    assert not (tmp_path / "run" / "summary.json").exists()
    whole = run(tmp_path / "whole", *ONE, f"student.sft={SFT}", NO_EVAL)
    assert train(config)["params_sha256"] == whole["params_sha256"]


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
    train(dataclasses.replace(config, method=method))
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [1, 1]
    log = (tmp_path / "run" / "logs" / "run.log").read_text()
    assert "step 2 skipped: no valid row is left" in log
    assert "4 of 4 updates were skipped" in log


def test_a_student_from_another_run_and_answers_of_the_teacher(finished, tmp_path):
    folder, _ = finished
    summary = run(
        tmp_path / "run", *ONE, NO_EVAL, f"student.path={folder}/models/student_start",
        f"teacher.path={folder}/models/teacher_default", "run.steps=1",
        f"student.sft={SFT}", "student.sft.source=teacher", "student.sft.teacher_rows=32",
        "eval.batch_size=8",
    )  # fmt: skip
    assert summary["params_sha256"]


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
