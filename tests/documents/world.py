"""A working folder in which the code blocks of README and docs run at tiny size.

Every name that a block uses stands there: DIR is a chat model, Qwen/Qwen3-8B another, prompts.jsonl
holds rows, runs/quickstart is a run. `fireopd` is a script that adds small sizes to a command.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fireopd_jax.text.tokenizer import byte_tokenizer

MODELS = ("DIR", "A", "B", "OTHER", "Qwen/Qwen3-8B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B")
RUNS = ("runs/quickstart_trd", "runs/x", "runs/math", "runs/code")
ROWS = (
    "prompts", "problems", "gsm8k", "gsm8k_test", "math500", "aime", "p", "F", "math", "code",
)  # fmt: skip
ARCHITECTURE = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
SMALL = (
    "mesh.data=1",
    "run.compare=[]",
    "run.steps=1",
    "optim.warmup_steps=0",
    "rollout.batch_size=8",
    "rollout.group_size=1",
    "rollout.max_tokens=24",
    "rollout.slots=null",
    "data.max_prompt_tokens=300",
    "data.min_prompt_tokens=0",
    "method.score.micro_batch_size=null",
    "optim.micro_batch_size=null",
    "eval.problems=2",
    "eval.samples=1",
    "eval.batch_size=null",
)
SHIM = """#!{python}
import os, re, subprocess, sys, urllib.request, time
arguments = sys.argv[1:]
command, small = arguments[0] if arguments else "", {small!r}
def answers(port):
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{{port}}/health", timeout=5))
    except OSError:
        return False
def serve(arguments, port):
    log = open("serve.log", "ab")
    real = [sys.executable, "-c", "from fireopd_jax.cli import main; main()", *arguments]
    server = subprocess.Popen(real, stdout=log, stderr=log, start_new_session=True)
    open("servers", "a").write(f"{{server.pid}}\\n")
    while not answers(port):
        if server.poll() is not None:
            sys.exit(f"serve ended: {{open('serve.log').read()}}")
        time.sleep(0.2)
if command in ("train", "sft"):
    text = " ".join(arguments)
    extra = list(small)
    if "quickstart" in text and "student.path" not in text or "smoke" in text:
        extra += ["student.architecture={model}", "teacher.architecture={model}",
                  "student.sft.steps=1", "teacher.sft.steps=1",
                  "student.sft.batch_size=4", "teacher.sft.batch_size=4",
                  "student.sft.optim.warmup_steps=0", "teacher.sft.optim.warmup_steps=0"]
    if "configs/model" in text:
        extra += ["student.path=DIR", "teacher.path=DIR"]
    elif "teacher" not in text and "quickstart" not in text and "smoke" not in text:
        extra += ["teacher.path=DIR"] if "opsd" not in text else []
    if "trd" in text:  # the rewrites of random models do not end, and would all be dropped
        extra += ["method.refine.fraction=0.5"]
    if "localhost:8000" in text and not answers("8000"):  # the reader's own server
        name = re.search(r"model: (\\w+)", text).group(1)
        os.path.exists(name) or os.symlink("DIR", name)
        serve(["serve", name, "--port", "8000"], "8000")
    arguments += extra
elif command == "eval" and "--set" in arguments:
    arguments += ["--samples", "1", "--max-tokens", "4", "--problems", "2"]
elif command == "generate":
    arguments += ["--max-tokens", "4"]
elif command == "serve":
    serve(arguments, arguments[arguments.index("--port") + 1] if "--port" in arguments else "8000")
    sys.exit(0)
sys.argv = ["fireopd", *arguments]
from fireopd_jax.cli import main
main()
"""


def build(folder: Path) -> Path:
    """Return the folder, with everything that the blocks name."""
    (folder / "bin").mkdir(parents=True)
    script(
        folder / "bin" / "fireopd",
        SHIM.format(python=sys.executable, small=SMALL, model=ARCHITECTURE),
    )
    # Environments are not made, nor anything installed: tests elsewhere look at their names.
    for name in ("make", "pip", "git"):
        script(folder / "bin" / name, "#!/bin/sh\nexit 0\n")
    script(
        folder / "bin" / "python3",
        f'#!/bin/sh\n[ "$2" = venv ] || exec {sys.executable} "$@"\n',
    )
    write_models(folder)
    write_rows(folder)
    for name in ("configs", "launch", "docs"):
        (folder / name).symlink_to(Path(__file__).parents[2] / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    (folder / "templates").mkdir()
    shutil.copy(folder / "DIR" / "chat_template.jinja", folder / "templates" / "math.jinja")
    write_runs(folder)
    return folder


def script(file: Path, text: str) -> None:
    """Write an executable file."""
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def write_models(folder: Path) -> None:
    """Write tiny random chat models, by `transformers`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=272, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=257, pad_token_id=256, tie_word_embeddings=True,
        use_mrope=False,
    )  # fmt: skip
    for name in MODELS:
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        with (folder / name / "chat_template.jinja").open("a") as template:
            template.write("{% if enable_thinking is defined %}{% endif %}")


def write_rows(folder: Path) -> None:
    """Write rows of sums under every name, as JSON lines; aime as Parquet, too."""
    rows = [
        {
            "question": f"What is {i} + {i}?",
            "answer": str(2 * i),
            "solution": f"{i} + {i} = {2 * i}",
            "teacher": "math" if i % 2 else "code",
        }
        for i in range(12)
    ]
    for name in ROWS:
        own = [row for row in rows if name not in ("math", "code") or row["teacher"] == name]
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(text)
    shutil.copy(folder / "p.jsonl", folder / "FILE.jsonl")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "aime.parquet")


def write_runs(folder: Path) -> None:
    """Train a run of 100 tiny steps with rewrites, so that it has every file that blocks read."""
    settings = [
        "method/trd", *SMALL[:2], "data.path=prompts.jsonl", "data.max_prompt_tokens=300",
        "student.path=DIR", "teacher.path=A", "rollout.batch_size=2", "rollout.max_tokens=8",
        "eval.problems=2", "eval.samples=1", "run.steps=100", "run.dir=runs/quickstart",
        "method.refine.max_prompt_tokens=600",
    ]  # fmt: skip
    code = "from fireopd_jax.cli import main; main()"
    (folder / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *settings],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "quickstart"
    # The quickstart makes these; models that are read from their paths are not copied into a run.
    for name in ("teacher_default", "student_start"):
        shutil.copytree(folder / "A", run / "models" / name, dirs_exist_ok=True)
    for name in RUNS:
        shutil.copytree(run, folder / name)
    for name, of in {"a": "student_after", "b": "student_before"}.items():
        shutil.copy(run / "eval" / f"{of}.jsonl", folder / f"{name}.jsonl")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a user in the folder: offline, its commands first."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    # One device, as a user's CPU; compiling, which takes most of the time, stays fast.
    kept["XLA_FLAGS"] = " ".join(
        flag for flag in kept.get("XLA_FLAGS", "").split() if "device_count" not in flag
    )
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}


def end_servers(folder: Path) -> None:
    """Kill the servers that blocks have started."""
    file = folder / "servers"
    for pid in file.read_text().split() if file.exists() else ():
        subprocess.run(["kill", "-9", pid], check=False)
