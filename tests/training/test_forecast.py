"""`fireopd plan`: a run's programs on given devices, without its weights and rows."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from fireopd_jax.commands.plan import as_json, size
from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_export import export_model
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runtime.memory import resident_bytes
from fireopd_jax.runtime.topologies import CHIPS, Topology, find_topology
from fireopd_jax.session.outline import outlined
from fireopd_jax.session.parameters import load_or_make
from fireopd_jax.session.setup import set_up
from fireopd_jax.training.abstract import nbytes
from fireopd_jax.training.fitting import Choice
from fireopd_jax.training.forecast import forecast, step_seconds
from tests.cases import random_params, tiny_model
from tests.commands.calling import TOKENIZER

SHAPE = (
    "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 16, intermediate_size: 64, vocab_size: 300}"
)
ABSENT = [
    f"student.architecture={SHAPE}", "student.path=owner/student",
    f"teachers.math.architecture={SHAPE}", "teachers.math.path=owner/math",
    f"teachers.code.architecture={SHAPE}", "teachers.code.path=owner/code",
    "data.path=nowhere.jsonl", "data.teacher_column=source", "data.max_prompt_tokens=32",
    "rollout.batch_size=16", "rollout.max_tokens=16", "eval.problems=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def planned():
    return forecast(load_config([*ABSENT, "mesh.fsdp=4"]), find_topology(None))


def test_what_is_not_here_has_a_stand_in():
    config, notes = outlined(load_config(ABSENT))
    assert config.student.path is None and config.student.architecture.vocab_size == 300
    assert [source.teacher for source in config.data.mixture] == ["math", "code"]
    assert config.data.max_prompt_tokens == 32 and len(notes) == 4
    assert "student: owner/student is not here; planned from student.architecture" in notes
    plain = load_config(["smoke"])
    assert outlined(plain) == (dataclasses.replace(plain), [])


def test_a_model_without_a_stated_shape_is_refused_by_its_key():
    settings = ["student.path=owner/student", "teacher.path=owner/teacher"]
    with pytest.raises(UserError, match=r"student\.path=owner/student: not on this machine, and"):
        outlined(load_config(settings))


def test_a_model_that_is_here_lends_its_tokenizer(tmp_path):
    model = tiny_model(len(TOKENIZER))
    export_model(
        tmp_path / "hf", random_params(model), model.config, TOKENIZER, stop=(257,), card="# a\n"
    )
    here = [f"student.path={tmp_path}/hf", "student.architecture={}"]
    config, notes = outlined(load_config([*ABSENT[2:], *here]))
    assert config.student.path == f"{tmp_path}/hf"
    assert config.teachers["math"].tokenizer == f"{tmp_path}/hf"
    assert set_up(config).student.model.vocab_size == len(TOKENIZER)
    assert not any(note.startswith("student") for note in notes)


def test_the_bytes_are_those_of_the_arrays(planned):
    config, _ = outlined(load_config([*ABSENT, "mesh.fsdp=4"]))
    setup = set_up(config)
    params = load_or_make(setup.student, Placement(setup.mesh))
    device = jax.devices()[0]
    here = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(params)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    found = planned.models["student"]
    assert here == found.bytes_per_device == nbytes(params) < found.bytes / 3
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_programs_have_memory_and_collectives(planned):
    assert {"score of student", "update of student", "rollout of student 0"} <= set(
        planned.programs
    )
    update = planned.programs["update of student"]
    assert update.peak >= update.arguments + update.beyond > 0
    assert update.collectives["all-gather"].count > 0
    assert planned.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    assert planned.choices["optim"].micro_batch_tokens > 0
    assert planned.largest_tokens >= planned.choices["optim"].micro_batch_tokens / 2
    written = json.loads(json.dumps(as_json(planned)))
    assert written["verdict"] == "fits" and written["seconds"] is None
    arrays = planned.devices * max(each.peak for each in planned.programs.values())
    assert written["process_bytes"] > resident_bytes("VmRSS") / 2 + arrays
    assert written["programs"]["update of student"]["collectives"]["all-gather"]["bytes"] > 0


def test_a_device_that_is_too_small_does_not_fit_it():
    here = find_topology(None)
    small = dataclasses.replace(here, bytes=100_000)
    found = forecast(load_config([*ABSENT, "optim.micro_batch_tokens=128"]), small)
    assert not found.fits and found.verdict == "does not fit" and found.largest_tokens == 0


def test_seconds_are_those_of_the_products_and_of_the_reads():
    config, _ = outlined(load_config([*ABSENT, "method.score.student=forward"]))
    setup = set_up(config)
    chip = CHIPS["v5p"]
    once = step_seconds(setup, chip, Choice())
    fast = step_seconds(setup, dataclasses.replace(chip, flops=2 * chip.flops), Choice())
    again = step_seconds(setup, chip, Choice(remat="full"))
    assert set(once) == {"rollout", "score", "update"}
    assert fast["update"] == pytest.approx(once["update"] / 2)
    # Three models forward; an update is as much as three, without recomputation.
    assert once["update"] == pytest.approx(once["score"]) == again["update"] * 3 / 4


def test_sizes_in_words():
    assert [size(n) for n in (3e5, 5e7, 6.71 * 2**30, 95 * 2**30)] == [
        "0.29 MiB", "48 MiB", "6.7 GiB", "95 GiB",
    ]  # fmt: skip


def test_a_mesh_that_the_devices_cannot_have_is_refused():
    devices = Topology("cpu:8", jax.devices()[:6], 2**30, None)
    with pytest.raises(UserError, match=r"mesh\.fsdp=4"):
        forecast(load_config([*ABSENT, "mesh.fsdp=4"]), devices)


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path):
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "fireopd_jax", "plan", *ABSENT, "--topology", "cpu:4"]
    done = subprocess.run(
        [*command, "--json", str(file)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "cpu:4: mesh data 4 x fsdp 1 x tensor 1" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("fits: ")
    assert json.loads(file.read_text())["devices"] == 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "fsdp", "tensor"),
    [("v5p:2x2x2", 4, 1), ("v5p:2x2x2", 2, 2), ("v6e:8", 2, 4), ("v5e:4", 4, 1), ("h100:4", 4, 1)],
)
def test_devices_are_planned_without_them(topology, fsdp, tensor):
    pytest.importorskip("jax_plugins.xla_cuda13" if topology.startswith("h") else "libtpu")
    config = load_config([*ABSENT, f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"])
    found = find_topology(topology)
    made = forecast(config, found)
    assert made.devices == len(found.devices) and made.fits and made.process_bytes is None
    assert made.seconds is not None and all(np.isfinite(s) for s in made.seconds.values())
    assert made.models["student"].bytes_per_device < made.models["student"].bytes
    assert "all-gather" in made.programs["update of student"].collectives
    assert DecoderConfig().dtype == "float32"  # of CPUs; a TPU computes in bfloat16
