"""Whatever ends a run, wherever: it goes on to the same bits, and its log has what was printed."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.training.run import train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
SFT = "{steps: 4, batch_size: 8, save_every: 2, optim: {learning_rate: 3e-3}}"
SETTINGS = [
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    "optim.learning_rate=1e-3",
    f"student.architecture={MODEL}",
    f"teacher.architecture={MODEL}",
    f"student.sft={SFT}",
    "run.save_every=2",
    "run.steps=6",
    "run.completions_every=3",
    "eval.problems=6",
    "eval.samples=1",
    "eval.batch_size=8",
    "eval.every=3",
    "eval.every_problems=4",
]
# The process does itself what ends it, at one point of its work, so that nothing depends on speed.
HARM = """
import os, signal, sys, time
# As at a terminal: a test may itself run under nohup, or in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
how, there, gone = {how!r}, {there!r}, {gone!r}
if how == "terminal":
    import fcntl, termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
done = []
def harm():
    if done:
        return
    done.append(True)
    if how == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
    elif how == "terminal":
        open(there, "w").close()
        while not os.path.exists(gone):
            time.sleep(0.01)
    else:
        os.kill(os.getpid(), getattr(signal, how))
def before(owner, name, when=lambda *a: True):
    call = getattr(owner, name)
    def harming(*arguments, **options):
        if when(*arguments):
            harm()
        return call(*arguments, **options)
    setattr(owner, name, harming)
"""
PLACES = {
    "import": "import fireopd_jax.commands.train as t; before(t, 'launch')",
    "set-up": "import fireopd_jax.training.rehearsal as r; before(r, 'set_up')",
    "compile": "from fireopd_jax.training.distill import Distillation as D; before(D, 'rollout')",
    "sft": "from fireopd_jax.training.sft import LossReports as R\n"
    "before(R, '__call__', lambda self, done, values: done == 2)",
    "distil": "from fireopd_jax.training.distill import Distillation as D\n"
    "before(D, 'score', lambda self, policies, rollout, state: int(state.updates) == 2)",
    "eval": "import fireopd_jax.session.session as s\n"
    "from fireopd_jax.training.evaluations import StepEvaluations as E\n"
    "seen = []\n"
    "call = E.__call__\n"
    "def noting(self, step, params):\n"
    "    seen.append(step)\n"
    "    return call(self, step, params)\n"
    "E.__call__ = noting\n"
    "before(s.Session, 'generate', lambda *a: bool(seen) and seen[-1] == 3)",
    "save": "from fireopd_jax.runs.checkpoints import Checkpoints as C\n"
    "save = C.save\n"
    "def saving(self, step, *rest):\n"
    "    save(self, step, *rest)\n"
    "    if self.folder.parent.name == 'run' and step == 4:\n"
    "        harm()\n"
    "C.save = saving",
}
EARLY = ("import", "set-up")
"""Places before the run has a folder, where signals have their usual effect."""
MAIN = "\nfrom fireopd_jax.cli import main; main()"


def started(folder, place, how, **streams):
    code = HARM.format(how=how, there=str(folder) + ".there", gone=str(folder) + ".gone")
    command = [sys.executable, "-c", f"{code}{PLACES[place]}{MAIN}", "train", *SETTINGS]
    return subprocess.Popen([*command, f"run.dir={folder}"], **streams)


def killed(folder, place, how):
    """Run the command line until it ends by `how` at `place`; return its status and output."""
    if how != "terminal":
        process = started(folder, place, how, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed = process.communicate()[0]
        return process.returncode, printed.decode()
    master, slave = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    process = started(folder, place, how, start_new_session=True, **streams)
    os.close(slave)
    os.set_blocking(master, False)
    while not Path(f"{folder}.there").exists() and process.poll() is None:
        _read(master)
        time.sleep(0.02)
    os.close(master)  # the kernel sends SIGHUP, and writes fail with EIO
    Path(f"{folder}.gone").touch()
    process.wait()
    return process.returncode, ""


def _read(master):
    try:
        os.read(master, 65536)
    except BlockingIOError:
        return


def status_of(place, how):
    if how == "pipe":
        return 0  # it costs the run nothing
    if how == "SIGKILL":
        return -signal.SIGKILL
    number = signal.SIGHUP if how == "terminal" else getattr(signal, how)
    return -number if place in EARLY and number != signal.SIGINT else 130


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(load_config([*SETTINGS, f"run.dir={tmp_path_factory.mktemp('whole') / 'run'}"]))


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "pipe", "terminal"])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_run_that_is_ended_goes_on_to_the_same_bits(whole, tmp_path, place, how):
    folder = tmp_path / "run"
    status, printed = killed(folder, place, how)
    assert status == status_of(place, how), printed
    assert "Traceback" not in printed
    assert folder.exists() == (place not in EARLY or how == "pipe")
    if status:
        assert not (folder / "summary.json").exists()
    logged = (folder / "logs" / "run.log").read_text() if folder.exists() else ""
    if place not in EARLY and how.startswith("SIG"):
        own = [line for line in printed.splitlines() if line.startswith(("student", "teacher"))]
        assert own and all(line in logged for line in own)
    if status == 130 and place not in EARLY:
        assert "resume" in logged.splitlines()[-1]
        if how.startswith("SIG"):
            assert "resume" in printed.splitlines()[-1]
    after = train(load_config([*SETTINGS, f"run.dir={folder}"]))
    assert {**after, "seconds": 0} == {**whole, "seconds": 0}
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records if "loss" in each] == [1, 2, 3, 4, 5, 6]
    assert [each["step"] for each in records if "eval/held_out/avg@1" in each] == [0, 3, 6]
