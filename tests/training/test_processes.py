"""Runs of several processes on this machine: what one process computes, stops and ends together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runtime.processes import ADDRESS, COUNT, RANK, join
from fireopd_jax.training.run import train

SMALL = ["smoke", "eval.problems=0", "run.save_every=2"]
MESH = ["mesh.data=2", "mesh.fsdp=2"]
METRICS = ("loss", "grad_norm", "completions/mean_length", "num_tokens", "student_entropy")
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_force_host_platform_device_count=2")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begin(arguments, *, processes=2, command="train"):
    """Start the command in so many processes of two devices each; return them, the leader first."""
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(*FLAGS),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
        "PYTHONUNBUFFERED": "1",
    }
    started = []
    for rank, own in enumerate(arguments if isinstance(arguments[0], list) else [arguments] * 2):
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "fireopd_jax", command, *own, "--distributed"],
                env=environment | {"JAX_PROCESS_ID": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def ended(started, within=240):
    """Return exit status and output of each process."""
    try:
        return [(p.communicate(timeout=within)[0], p.returncode) for p in started]
    finally:
        for each in started:
            each.kill()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def alone(arguments, mesh=MESH):
    """Train in this process, on four devices."""
    return train(load_config([*arguments, *mesh]))


def check_equal(got, wanted):
    assert len(got) == len(wanted)
    keys = [key for key in METRICS if key in wanted[0]]
    assert len(keys) >= 3
    for one, other in zip(got, wanted, strict=True):
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def run_both(tmp_path, own, mesh=MESH):
    """Train in two processes and in one, to equal metrics; return folders and output."""
    together, by_itself = tmp_path / "together", tmp_path / "alone"
    started = begin([*own, *mesh, f"run.dir={together}"])
    alone([*own, f"run.dir={by_itself}"], mesh)
    (said, status), (follower, other) = ended(started)
    assert status == other == 0, said + follower
    check_equal(metrics(together), metrics(by_itself))
    return together, by_itself, (said, follower)


@pytest.mark.parametrize(
    "mesh",
    [
        MESH,
        pytest.param(["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"], marks=pytest.mark.slow),
        pytest.param(["mesh.data=1", "mesh.tensor=4"], marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_two_processes_learn_what_one_does(tmp_path, mesh):
    """Parameters are sharded over the devices of both; only the first writes."""
    own = [*SMALL, "run.steps=2", "student.lora={rank: 4}"]
    together, _, (said, follower) = run_both(tmp_path, own, mesh)
    assert "done in" in said and "done in" not in follower
    logs = {file.name for file in (together / "logs").iterdir()}
    assert logs == {"run.log", "process-1.log"}
    assert (together / "summary.json").is_file()


@pytest.mark.slow
def test_other_configurations_and_what_cannot_be_shared_are_refused_once(tmp_path):
    own = [*SMALL, f"run.dir={tmp_path / 'run'}"]
    for arguments, message in (
        ([[*own, "run.steps=3"], [*own, "run.steps=4"]], "run.steps was 3, is now 4"),
        (
            [*own, "rollout.window=4", "method.loss.importance_cap=2"],
            "rollout.window: not supported with 2 processes",
        ),
    ):
        (said, status), (follower, other) = ended(begin(arguments))
        assert status == other == 2
        assert message in said and "fireopd" not in follower
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_waits_in_vain_ends_with_a_line(rank):
    code = (
        "import sys, fireopd_jax.runtime.processes as p; p.JOIN_S = 3\n"
        "from fireopd_jax.cli.main import main\n"
        "sys.argv = ['fireopd', 'train', 'smoke', '--distributed']; main()"
    )
    address = f"127.0.0.1:{free_port()}"
    own = {ADDRESS: address, COUNT: "2", RANK: str(rank)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "--distributed" in line]
    assert f"process {rank} of 2 waited 3 s for the others" in line and address in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({COUNT: "2"}, f"{ADDRESS}: missing; expected it beside {COUNT}"),
        ({ADDRESS: "a:1", COUNT: "2", RANK: "x"}, f"{RANK}=x: expected a whole number"),
        ({ADDRESS: "a:1", COUNT: "2", RANK: "2"}, f"{RANK}=2: expected a number below {COUNT}=2"),
        ({ADDRESS: "host", COUNT: "2", RANK: "0"}, f"{ADDRESS}=host: expected host:port"),
    ],
)
def test_variables_that_say_no_place_are_named(given, message, monkeypatch):
    for name in (ADDRESS, COUNT, RANK):
        monkeypatch.setenv(name, given.get(name, ""))
    with pytest.raises(UserError, match=message):
        join(True)


def wait_for_steps(folder, steps, started):
    for _ in range(600):
        file = folder / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= steps:
            return
        assert all(each.poll() is None for each in started), [p.communicate()[0] for p in started]
        time.sleep(0.2)
    raise AssertionError("no steps")


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_any_of_them_stops_all_and_the_run_goes_on(victim, tmp_path):
    folder = tmp_path / "run"
    own = [*SMALL, "mesh.data=2", "mesh.fsdp=2", f"run.dir={folder}", "run.steps=300"]
    started = begin(own)
    wait_for_steps(folder, 3, started)
    started[victim].send_signal(signal.SIGTERM)
    (said, status), (_, other) = ended(started, 60)
    assert status == other == 130, said
    assert f"go on with: fireopd resume {folder}" in said
    done = len(metrics(folder))
    # A process alone, with the same number of devices, goes on to what two would have come to.
    steps = f"run.steps={done + 2}"
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("steps: 300", f"steps: {done + 2}"))
    (said, status), (_, other) = ended(begin([str(folder)], command="resume"))
    assert status == other == 0, said
    by_itself = tmp_path / "alone"
    alone([*SMALL, steps, f"run.dir={by_itself}"])
    check_equal(metrics(folder), metrics(by_itself))


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_when_one_is_killed_and_one_process_goes_on(victim, tmp_path):
    folder = tmp_path / "run"
    started = begin([*SMALL, "mesh.data=2", "mesh.fsdp=2", f"run.dir={folder}", "run.steps=300"])
    wait_for_steps(folder, 5, started)
    started[victim].kill()
    begun = time.monotonic()
    ended(started, 60)
    assert time.monotonic() - begun < 60
    assert started[1 - victim].returncode not in (0, None)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("steps: 300", "steps: 6"))
    train(load_config([str(config), f"run.dir={folder}"]))
    by_itself = tmp_path / "alone"
    alone([*SMALL, "run.steps=6", f"run.dir={by_itself}"])
    check_equal(metrics(folder), metrics(by_itself))


@pytest.mark.slow
def test_rewrites_evaluations_and_an_export_are_the_same(tmp_path):
    """Stages of the host that generate, a teacher that is trained, and files of transformers."""
    own = [
        "quickstart_trd",
        "teacher.sft.steps=3",
        "student.sft.steps=2",
        "rollout.batch_size=8",
        "optim.warmup_steps=0",
        "teacher.sft.optim.warmup_steps=0",
        "student.sft.optim.warmup_steps=0",
        "run.steps=2",
        "run.export=true",
        "eval.problems=8",
        "eval.samples=1",
    ]
    together, by_itself, _ = run_both(tmp_path, own)
    exported = [(run / "models/student_hf").glob("*.safetensors") for run in (together, by_itself)]
    ours, theirs = (safetensors.numpy.load_file(next(files)) for files in exported)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-4, err_msg=name)
    graded = [{file.name for file in (run / "eval").iterdir()} for run in (together, by_itself)]
    assert graded[0] == graded[1] and graded[0]
