"""A folder of a user with a chat model, rows, and a finished run; its copies, one a case."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from fireopd_jax.models.hf_export import export_model
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer
from tests.cases import random_params, tiny_model
from tests.hostile.case import Case

TOKENIZER = load_tokenizer(BUILTIN)
SMALL = """\
run: {name: mine, steps: 2}
student: {path: DIR}
teacher: {path: DIR}
data: {path: prompts.jsonl, max_prompt_tokens: 64}
rollout: {batch_size: 8, group_size: 1, max_tokens: 8}
optim: {learning_rate: 1e-3, warmup_steps: 0}
eval: {problems: 2, samples: 1}
"""
ROWS = "".join(
    json.dumps({"prompt": f"What is {i} + {i}?", "answer": str(2 * i)}) + "\n" for i in range(1, 9)
)
SECONDS, MIB = 120, 4096
LIMITED = ["timeout", "-s", "KILL", str(SECONDS), "bash", "-c"]


@dataclass(frozen=True)
class Answer:
    """What a command did: its exit status (124: it hung), text, seconds, and peak memory."""

    status: int
    text: str
    seconds: float
    mib: int

    @property
    def line(self) -> str:
        """The last line that says something."""
        lines = [line for line in self.text.splitlines() if line.strip(" \r\n")]
        return lines[-1].strip() if lines else ""


def build(folder: Path) -> Path:
    """Return the folder, made once."""
    folder.mkdir()
    model = tiny_model(len(TOKENIZER), max_position_embeddings=256)
    params = jax.tree.map(lambda leaf: leaf * 1.5, random_params(model))
    export_model(folder / "DIR", params, model.config, TOKENIZER, stop=(257,), card="# a model\n")
    (folder / "prompts.jsonl").write_text(ROWS)
    (folder / "small.yaml").write_text(SMALL)
    answer = run(folder, "fireopd train small.yaml run.dir=runs/done run.steps=2")
    assert answer.status == 0, answer.text
    return folder


def run(folder: Path, command: str) -> Answer:
    """Return what the command did; it is killed after SECONDS, and never has more than 8 GiB."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = here | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
        "HOME": str(home),
    }
    written, begun = folder / ".answer", time.monotonic()
    with written.open("wb") as output:
        process = subprocess.Popen(
            [*LIMITED, f"ulimit -d {8 << 20}\n{command}"],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # else it waits for it once more
    return Answer(
        process.returncode,
        written.read_text(encoding="utf-8", errors="replace"),
        time.monotonic() - begun,
        usage.ru_maxrss // 1024,
    )


def answer_to(case: Case, world: Path, folder: Path) -> Answer:
    """Return the answer to a case, in a copy of the world."""
    shutil.copytree(world, folder, symlinks=True)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.prepare is not None:
        case.prepare(folder)
    return run(folder, case.command)
