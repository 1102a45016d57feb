"""Runs that train adapters: resumed to the same bits, saved and exported merged."""

import json
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from fireopd_jax.models.hf_names import hf_tensors
from fireopd_jax.runs.checkpoints import saved_steps
from fireopd_jax.session.exporting import at_step, export_run
from fireopd_jax.session.finished import open_model
from tests.training.test_training import KILL_AT_SAVE, NO_EVAL, ONE, SFT, command, lines, run

LORA = [
    *ONE,
    NO_EVAL,
    f"student.sft={SFT}",
    "student.lora={rank: 2, targets: [q_proj, up_proj]}",
    "run.steps=4",
    "run.keep=3",
    "optim.learning_rate=1e-2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return folder, run(folder, *LORA, "run.export=true", "run.compare=[opd]")


def moved(folder):
    """Names of the parameters that the run has changed."""
    _, start = open_model(folder, "student_start")
    _, after = open_model(folder, "student")
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree.leaves_with_path(start), jax.tree.leaves(after), strict=True
        )
        if not np.array_equal(a, b)
    }


def test_only_the_targets_move(finished):
    folder, _ = finished
    assert moved(folder) == {"layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel"}
    trained = [line for line in lines(folder) if "loss" in line]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in trained)
    # The model that answers is the one that is trained.
    assert all(abs(line["policy/log_ratio_max"]) < 1e-4 for line in trained)
    assert [line["perf/compilations"] for line in trained][1:] == [0] * 3


def test_checkpoints_hold_adapters_alone(finished):
    folder, _ = finished
    metadata = folder / "checkpoints" / "4" / "state" / "_METADATA"
    kept = json.loads(metadata.read_text())["tree_metadata"]
    assert any("q_proj" in name and "'a'" in name for name in kept)
    assert not any("kernel" in name or "embed_tokens" in name for name in kept)


def test_the_exported_model_is_the_merged_one(finished, tmp_path):
    folder, _ = finished
    spec, params = open_model(folder, "student")
    wanted = dict(hf_tensors(params, spec.model.config))
    export_run(folder, tmp_path / "four", step=4)
    for written in (folder / "models" / "student_hf", tmp_path / "four"):
        tensors = load_file(written / "model.safetensors")
        assert tensors.keys() == wanted.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)
    export_run(folder, tmp_path / "two", step=2)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    assert not np.array_equal(tensors[name], wanted[name])
    control = at_step(folder, "opd", 4)[1]
    _, opd = open_model(folder, "opd")
    jax.tree.map(np.testing.assert_array_equal, control, opd)


@pytest.mark.slow
@pytest.mark.kill
def test_a_killed_run_with_adapters_goes_on_to_the_same_bits(finished, tmp_path):
    _, summary = finished
    folder = tmp_path / "run"
    killed = command(folder, LORA, KILL_AT_SAVE.format(place="run", step=2, whole=True))
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert saved_steps(folder / "checkpoints") == [2]
    resumed = command(folder, LORA)
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming from step 2 of 4" in resumed.stdout
    after = json.loads((folder / "summary.json").read_text())
    assert after["params_sha256"] == summary["params_sha256"]
