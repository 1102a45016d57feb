"""Time and memory of loading a checkpoint, against reading its files; compile time by depth.

    a folder, or random shards -> processes: read every tensor, load -> medians, largest peak
    deep and shallow models of a tiny width -> score, update -> compiled anew -> medians

Each round of loading is a process of its own, because a user waits for the first load, with all
that it compiles, and because the peak of memory is that of a process. The files are in the page
cache by then. They are read twice: into a buffer that is reused, and into memory that is kept, as
for loaded parameters. Where new pages are expensive the two differ much.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.head import write_whole
from fireopd_jax.config import UserError
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.scoring import Resident, SampledToken, ScoreInputs
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_export import write_json, write_weights
from fireopd_jax.models.hf_load import load, open_folder, read_config
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.runtime.memory import resident_bytes
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import make_update
from fireopd_jax.types import Batch, Prompts, Rollout, Scores, TokenStats

GIB = 2**30
SHARDS = 5
LAYERS, VOCABULARY = 16, 16  # the vocabulary as a multiple of the width
DEEP, SHALLOW = 36, 12
Type = Literal["float32", "bfloat16"]
Row = dict[str, Any]


def bench_load(
    folder: Path | None,
    gib: float,
    dtype: str | None,
    rounds: int,
    layers: tuple[int, int] = (DEEP, SHALLOW),
    file: Path | None = None,
) -> Row:
    """Measure a folder, or random shards of `gib` GiB; print tables, write JSON and return it.

    `dtype` is that of the parameters, by default the folder's. Raises UserError for bad options.
    """
    for option, value in (("--gib", gib), ("--rounds", rounds)):
        if not value > 0:
            raise UserError(f"{option}: expected more than 0, got {value}")
    if dtype not in (None, *get_args(Type)):
        raise UserError(f"--dtype: expected {' or '.join(get_args(Type))}, got {dtype!r}")
    with tempfile.TemporaryDirectory(prefix="fireopd-bench-") as own:
        if folder is None:
            write_random(Path(own), gib)
        loads = [measure_in_process(folder or Path(own), dtype) for _ in range(rounds)]
    result: Row = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "folder": str(folder) if folder else f"{gib} GiB at random",
        "rounds": rounds,
        "load": load_row(loads),
        "compile": compile_rows(layers, rounds),
    }
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    print_tables(result)
    return result


def write_random(folder: Path, gib: float) -> None:
    """Write a random bfloat16 model of about `gib` GiB in several files."""
    per_square = LAYERS * 12 + VOCABULARY
    width = max(32, 32 * round(math.sqrt(gib * GIB / 2 / per_square) / 32))
    config = DecoderConfig(
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=width // 16,
        intermediate_size=3 * width,
        param_dtype="bfloat16",
    )
    rows = VOCABULARY * width
    model = LanguageModel(config, rows)
    params = jax.jit(model.init)(jax.random.key(0))
    write_json(folder / "config.json", hf_config_json(config, rows, dtype="bfloat16"))
    write_weights(folder, params, config, "bfloat16", max(1, int(gib * GIB) // SHARDS))


def measure_in_process(folder: Path, dtype: str | None) -> Row:
    """Return the measurements of one load in a process of its own."""
    # The process needs nothing but its arguments.
    command = [sys.executable, "-m", "fireopd_jax.bench.load", str(folder), dtype or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(reason.removeprefix("fireopd_jax.config.UserError: "))
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, dtype: str | None) -> Row:
    """Return times of reading every tensor, of loading, and of reading into kept memory."""
    config = read_config(folder)
    config = dataclasses.replace(config, param_dtype=dtype or config.dtype)
    assert config.vocab_size is not None
    place = SingleDeviceSharding(jax.devices()[0])
    jax.block_until_ready(jnp.zeros(1))  # initialise the device before the clock starts
    tensors = list(open_folder(folder).values())
    for _ in range(2):  # the first fills the page cache
        start = time.perf_counter()
        for tensor in tensors:
            tensor.rows(0, tensor.shape[0])
        read_s = time.perf_counter() - start
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    params = jax.block_until_ready(load(folder, config, config.vocab_size, place))
    load_s = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    extra = resident_bytes("VmHWM") - before - (size if on_host(params) else 0)
    del params
    start = time.perf_counter()
    kept_tensors = [tensor.rows(0, tensor.shape[0]) for tensor in tensors]
    keep_s = time.perf_counter() - start
    return {
        "file_bytes": sum(tensor.nbytes for tensor in kept_tensors),
        "parameter_bytes": size,
        "read_seconds": read_s,
        "keep_seconds": keep_s,
        "load_seconds": load_s,
        "extra_bytes": max(0, extra),
    }


def on_host(params: Params) -> bool:
    """Return whether the parameters themselves are in the memory of the process."""
    return all(d.platform == "cpu" for leaf in jax.tree.leaves(params) for d in leaf.devices())


def load_row(rounds: list[Row]) -> Row:
    """Return the medians of the times and the largest peak."""
    keys = ("read_seconds", "keep_seconds", "load_seconds")
    times = {key: statistics.median(each[key] for each in rounds) for key in keys}
    return {
        **rounds[0],
        **times,
        "extra_bytes": max(each["extra_bytes"] for each in rounds),
        "ratio_to_read": times["load_seconds"] / times["read_seconds"],
        "ratio_to_keep": times["load_seconds"] / times["keep_seconds"],
    }


def compile_rows(layers: tuple[int, int], rounds: int) -> list[Row]:
    """Return compile times of score and update, of the deep and the shallow model."""
    keys = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
    before = {key: jax.config.values[key] for key in keys}
    compile_cache(enabled=False)
    try:
        times: dict[tuple[str, int], list[float]] = {}
        for turn in range(rounds + 1):
            for depth in layers:
                for name, lower in programs(depth).items():
                    jax.clear_caches()
                    start = time.perf_counter()
                    lower().compile()
                    if turn:  # not the first, which also imports and initialises much of JAX
                        times.setdefault((name, depth), []).append(time.perf_counter() - start)
    finally:
        for key, value in before.items():
            jax.config.update(key, value)
        reset_cache()
    deep, shallow = layers
    seconds = {key: statistics.median(value) for key, value in times.items()}
    return [
        {
            "program": name,
            "layers": deep,
            "seconds": seconds[name, deep],
            "shallow_layers": shallow,
            "shallow_seconds": seconds[name, shallow],
            "ratio": seconds[name, deep] / seconds[name, shallow],
        }
        for name in ("score", "update")
    ]


def programs(depth: int) -> dict[str, Callable[[], Any]]:
    """Return functions that lower score and update for a model with `depth` layers."""
    config = DecoderConfig(
        hidden_size=32, num_hidden_layers=depth, head_dim=8, intermediate_size=64
    )
    model = LanguageModel(config, 256)
    params = model.shapes()
    optimizer = make_optimizer(OptimConfig(), 1)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    batch = jax.eval_shape(make_batch)
    temperature = jnp.float32(1)
    update = make_update(model, SampledReverseKL(), optimizer)

    def score(student, teacher, rollout, temperature):
        inputs = ScoreInputs(
            rollout, Resident(model, student), [Resident(model, teacher)], temperature
        )
        return SampledToken()(inputs)

    return {
        "score": lambda: jax.jit(score).lower(params, params, batch.rollout, temperature),
        "update": lambda: jax.jit(update).lower(state, batch, temperature),
    }


def make_batch(rows: int = 4, width: int = 8, length: int = 8) -> Batch:
    """Return a batch of zeros."""
    of_row, ids = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, width), jnp.int32)
    prompts = Prompts(ids, of_row, ids, of_row, of_row, of_row, of_row, of_row)
    values = jnp.zeros((rows, length))
    tokens, mask = values.astype(jnp.int32), values > 0
    rollout = Rollout(prompts, tokens, mask, values, values, of_row > 0, tokens, tokens)
    stats = TokenStats(values, values)
    return Batch(rollout, Scores(stats, stats), values, values)


def print_tables(result: Row) -> None:
    """Print the measurements."""
    row = result["load"]
    title = f"{result['folder']}, {result['device']}, medians of {result['rounds']}"
    table = Table("files GiB", "read s", "read, kept s", "load s", "/ read", "/ kept", title=title)
    table.add_column("extra GiB, at most")
    table.add_row(
        f"{row['file_bytes'] / GIB:.2f}",
        f"{row['read_seconds']:.3f}",
        f"{row['keep_seconds']:.3f}",
        f"{row['load_seconds']:.3f}",
        f"{row['ratio_to_read']:.2f}",
        f"{row['ratio_to_keep']:.2f}",
        f"{row['extra_bytes'] / GIB:.2f}",
    )
    compiled = Table("program", "layers", "compile s", "layers", "compile s", "ratio")
    for row in result["compile"]:
        cells = (row["layers"], row["seconds"], row["shallow_layers"], row["shallow_seconds"])
        shown = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in (*cells, row["ratio"])]
        compiled.add_row(row["program"], *shown)
    console = Console(width=max(Console().width, 100))
    console.print(table)
    console.print(compiled)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] or None)))  # type: ignore[arg-type]
