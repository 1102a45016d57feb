"""Runs with a teacher in eight bits: made, read from each kind of folder, used again, exported."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from fireopd_jax import cli
from fireopd_jax.config import UserError
from fireopd_jax.models.quantized import Quantized, dequantize
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.exporting import export_run
from fireopd_jax.session.finished import evaluate_model, open_model
from tests.training.test_training import MODEL, NO_EVAL, SFT, lines, run

BASE = [
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    f"student.architecture={MODEL}",
    "run.steps=2",
]
TEACHER = ["teacher.quantize=int8", f"teacher.architecture={MODEL}", f"teacher.sft={SFT}"]
EVAL = ["eval.problems=4", "eval.samples=1", "eval.batch_size=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "int8"
    return folder, run(folder, *BASE, *TEACHER, *EVAL)


def kernel(folder, name="teacher_default"):
    _, params = open_model(folder, name)
    return params["layers"]["mlp"]["up_proj"]["kernel"]


@pytest.mark.slow
def test_the_teacher_scores_and_is_kept_in_eight_bits(finished):
    folder, _ = finished
    assert isinstance(kernel(folder), Quantized)
    assert kernel(folder, "student").dtype == np.float32
    trained = [line for line in lines(folder) if "loss" in line]
    assert len(trained) == 2
    for line in trained:
        assert np.isfinite(line["loss"]) and line["skipped"] == 0 and line["grad_norm"] > 0


def test_it_is_graded_again_as_it_was(finished):
    folder, summary = finished
    again = evaluate_model(folder, "teacher_default", [])
    assert again == summary["teacher"]


@pytest.mark.slow
def test_every_kind_of_folder_is_quantised_to_the_same_numbers(finished, tmp_path):
    folder, _ = finished
    # A student is a whole model; here it is the teacher.
    saved, exported = folder / "models" / "student", tmp_path / "exported"
    export_run(folder, exported)
    for name, path in {"saved": saved, "hf": exported}.items():
        run(tmp_path / name, *BASE, NO_EVAL, f"teacher.path={path}", "teacher.quantize=int8")
    a, b = kernel(tmp_path / "saved"), kernel(tmp_path / "hf")
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.scale, b.scale)
    before = kernel(folder, "student")
    assert 0 < np.abs(before - dequantize(a)).max() <= np.max(a.scale) * 0.5001


@pytest.mark.slow
def test_a_folder_in_eight_bits_is_taken_as_it_is_and_exported_whole(finished, tmp_path):
    folder, _ = finished
    path = folder / "models" / "teacher_default"
    run(tmp_path / "next", *BASE, NO_EVAL, f"teacher.path={path}")
    np.testing.assert_array_equal(kernel(tmp_path / "next").values, kernel(folder).values)
    export_run(tmp_path / "next", tmp_path / "hf", model="teacher_default")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = np.asarray(dequantize(kernel(folder))[0]).T
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], wanted)


def test_what_is_in_eight_bits_cannot_learn(finished, tmp_path):
    folder, _ = finished
    path = folder / "models" / "teacher_default"
    student = [s for s in BASE if "student" not in s] + [f"student.path={path}"]
    with pytest.raises(UserError, match=r"student: .* holds int8 weights, which cannot be trained"):
        run(tmp_path / "a", *student, NO_EVAL, f"teacher.architecture={MODEL}")
    with pytest.raises(UserError, match=r"teacher default: .* cannot be trained; .*, or no sft"):
        run(tmp_path / "b", *BASE, NO_EVAL, f"teacher.path={path}", f"teacher.sft={SFT}")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "setting, said",
    [
        ("teacher.quantize=int9", "teachers.default.quantize"),
        ("teacher.quantise=int8", "teachers.default.quantize"),
        ("student.quantize=int8", "student.quantize"),
    ],
)
def test_a_wrong_setting_is_one_line(setting, said):
    with pytest.raises(UserError) as caught:
        load_config(["smoke", setting])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_smoke_run_takes_it_from_the_command_line(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    settings = ["teacher.quantize=int8", "run.steps=1", "mesh.data=1", NO_EVAL]
    monkeypatch.setattr(sys, "argv", ["fireopd", "train", "smoke", *settings, f"run.dir={folder}"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    described = json.loads((folder / "models" / "teacher_default" / "model.json").read_text())
    assert described["quantize"] == "int8"
    assert dataclasses.is_dataclass(kernel(folder))
