"""TRL's trainer for on-policy distillation as a contestant of the step benchmark.

    the same models in Hugging Face's format, the same requests -> a process for each number of
    threads -> one step of GKDTrainer for each round

The processes wait between their steps, so that rounds can be interleaved with ours.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import IO, Any

import jax

from fireopd_jax.bench.head import MIB
from fireopd_jax.bench.step_report import usable_cores
from fireopd_jax.bench.trl_process import STEP
from fireopd_jax.bench.workload import Workload
from fireopd_jax.config import UserError
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_export import MAX_SHARD_BYTES, write_json, write_weights
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.runtime.memory import resident_bytes
from fireopd_jax.session.setup import Setup

THREADS = (1, 2)
NEEDED = ("torch", "trl", "accelerate")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
    # Threads that spin while they wait take CPU time from the others.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def check_trl() -> None:
    """Raise UserError where TRL's trainer cannot run."""
    if jax.default_backend() != "cpu":
        raise UserError(
            f"--compare trl runs on a CPU only, this machine has {jax.default_backend().upper()}"
        )
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(
            f"--compare trl needs {', '.join(missing)}: pip install fireopd-jax[parity] trl"
        )


@dataclasses.dataclass
class Trainer:
    """A process that runs one training step for each line that it is sent."""

    threads: int
    process: subprocess.Popen[str]
    errors: IO[str]
    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0

    def step(self) -> dict[str, Any]:
        """Run one step; return its seconds. Raises UserError where the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(OSError):  # if it has ended, so has its output
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(STEP):
                return json.loads(line[len(STEP) :])
        self.errors.seek(0)
        last = (self.errors.read().strip() or "no message").splitlines()[-1]
        raise UserError(f"--compare trl: TRL's trainer has ended: {last}")

    def round(self) -> None:
        """Run one step and record its seconds, and the peak of the process's memory."""
        found = self.step()
        self.cpu.append(found["cpu"])
        self.wall.append(found["wall"])
        self.peak = resident_bytes("VmHWM", str(self.process.pid))

    def row(self) -> dict[str, Any]:
        """Return the medians."""
        return {
            "trainer": "GKDTrainer",
            "threads": self.threads,
            "cpu_seconds": median(self.cpu),
            "wall_seconds": median(self.wall),
            "peak_rss_mib": self.peak / MIB,
            "seconds": {"cpu": self.cpu, "wall": self.wall},
        }

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def trl_contestants(
    stack: ExitStack, setup: Setup, params: list[Params], work: Workload, rounds: int
) -> list[Trainer]:
    """Return the trainers, after a step that is not measured; `stack` ends them.

    One with one thread, and one with two if this process may use as many cores.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fireopd-bench-")))
    models = {"student": setup.student.model, "teacher": setup.teachers[0].model}
    for (name, model), own in zip(models.items(), params, strict=True):
        write_model(folder / name, model, own)
    rows = zip(work.prompt, work.length, strict=True)
    described = {
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "vocabulary": setup.student.model.vocab_size,
        "prompts": [prompt[:length].tolist() for prompt, length in rows],
        "lengths": work.response.tolist(),
        "steps": rounds + 2,
        "learning_rate": setup.config.optim.learning_rate,
        "output": str(folder / "output"),
    }
    write_json(folder / "step.json", described)
    trainers = []
    for threads in THREADS:
        if threads > (usable_cores() or 1):
            continue
        errors = stack.enter_context((folder / f"errors-{threads}").open("w+", encoding="utf-8"))
        process = subprocess.Popen(
            [sys.executable, "-m", "fireopd_jax.bench.trl_process", str(folder / "step.json")],
            env=os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        trainers.append(Trainer(threads, process, errors))
        stack.callback(trainers[-1].close)
        trainers[-1].step()
    return trainers


def write_model(folder: Path, model: LanguageModel, params: Params) -> None:
    """Write a model in Hugging Face's format; its last token id ends and pads responses."""
    folder.mkdir()
    last, dtype = model.vocab_size - 1, model.config.dtype
    ids = {"eos_token_id": last, "pad_token_id": last}
    described = hf_config_json(model.config, model.vocab_size, dtype=dtype, **ids)
    write_json(folder / "config.json", described)
    write_weights(folder, params, model.config, dtype, MAX_SHARD_BYTES)
