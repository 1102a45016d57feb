"""Useful tokens per second: the engine, our own static batch, and Hugging Face `generate`.

    one random model, one list of requests -> every contestant -> interleaved rounds -> medians

On a CPU, seconds are CPU seconds of the whole process, all threads; elsewhere they are wall-clock
seconds. Prefill is included, compilation is not. Elsewhere the static batch is left out, because
its program would compile for a minute; instead the table has the time that memory traffic alone
would take.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.contestants import (
    ENGINE,
    STATIC,
    hugging_face,
    make_engine,
    on_one_core,
    pytorch,
    run_engine,
    static_batch,
)
from fireopd_jax.bench.head import write_whole
from fireopd_jax.bench.workload import MODELS, Contestant, Workload, measure, workloads
from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_dense_gpu import DenseGPU
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from fireopd_jax.rollout.layouts import AUTO, CacheLayout
from fireopd_jax.rollout.statistics import Statistics
from fireopd_jax.session.fits import CACHES as NEEDS
from fireopd_jax.session.fits import check_model

PAGE = 64
CACHES: dict[str, CacheLayout] = {
    "auto": AUTO,
    "dense": Dense(),
    "dense_gpu": DenseGPU(),
    "paged": Paged(page_size=PAGE),
    "paged_gpu": PagedGPU(page_size=PAGE),
    "paged_tpu": PagedTPU(),
}

Row = dict[str, Any]


def bench_rollout(
    compare: str | None,
    slots: int,
    rounds: int,
    file: Path | None,
    name: str = "small",
    cache: str = "dense",
) -> Row:
    """Measure the contestants, print a table, write JSON and return its contents."""
    check(compare, name, cache)
    config, memory = MODELS[name], CACHES[cache]
    assert config.vocab_size is not None
    model = LanguageModel(config, config.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0))
    command = f"fireopd bench rollout --model {name} --cache {cache} --slots {slots}"
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    result: Row = {
        "command": f"{command} --rounds {rounds}" + (f" --compare {compare}" if compare else ""),
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "rounds": rounds,
        "bandwidth": None if on_cpu else bandwidth(),
        "workloads": [],
    }
    for work in workloads(name, slots):
        fitting = min(slots, len(work.length))
        engine = make_engine(model, params, work, fitting, memory)
        contestants = [
            Contestant(
                ENGINE, work.tokens, lambda engine=engine, work=work: run_engine(engine, work)
            )
        ]
        if on_cpu:  # on other platforms its program would compile for a minute more
            contestants.append(static_batch(model, params, work, fitting, memory))
        if compare == "hf":
            contestants += hugging_face(model, params, work, slots)
        # Some operating systems cannot pin a process to a core.
        if compare == "hf" and on_cpu and hasattr(os, "sched_setaffinity"):
            contestants.append(on_one_core(model, work, fitting, memory))
        measure(contestants, rounds)
        row = summary(work, engine.programs, engine.statistics, contestants, on_cpu)
        if result["bandwidth"]:
            row |= memory_floor(model, params, work, engine.statistics, rounds, result["bandwidth"])
            row["floor_fraction"] = row["floor_seconds"] / row["wall_seconds"]
        result["workloads"].append(row)
    first = result["workloads"][0]
    rates = ("useful_tokens_per_cpu_second", "useful_tokens_per_second")
    keys = (*rates, "ratio_to_hf", "ratio_to_static", "programs")
    result |= {key: first[key] for key in (*keys, "slot_use", "compile_seconds")}
    print_table(result)
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    return result


def check(compare: str | None, name: str, cache: str) -> None:
    """Raise UserError for an option that is unknown or cannot run here, before any computation."""
    for option, given, known in (
        ("--compare", compare, ["hf"]),
        ("--model", name, list(MODELS)),
        ("--cache", cache, list(CACHES)),
    ):
        if given is not None and given not in known:
            raise UserError(f"{option} {given}: expected {', '.join(known)}{nearest(given, known)}")
    here = jax.default_backend()
    if (needed := NEEDS.get(cache, here)) != here:
        raise UserError(
            f"--cache {cache} runs on {needed.upper()} only, this machine has {here.upper()}"
        )
    check_model(CACHES[cache], MODELS[name], f"--model {name}, --cache {cache}")
    if compare is not None:
        pytorch()


def bandwidth(gib: int = 2, calls: int = 20) -> float:
    """Return the memory bandwidth in bytes per second, measured by an elementwise pass."""
    x = jnp.zeros(gib * 2**30 // 4, jnp.float32)
    turn = jax.jit(jnp.negative, donate_argnums=0)
    x = jax.block_until_ready(turn(x))
    start = time.perf_counter()
    for _ in range(calls):
        x = turn(x)
    jax.block_until_ready(x)
    return 2 * x.nbytes * calls / (time.perf_counter() - start)


def memory_floor(
    model: LanguageModel,
    params: Params,
    work: Workload,
    engine: Statistics,
    rounds: int,
    bytes_per_second: float,
) -> Row:
    """Return the seconds that the steps would take if they only read what they must.

    That is the weights once per step, and per token the keys and values of all earlier positions.
    """
    c = model.config
    shapes = jax.tree.leaves(jax.eval_shape(model.to_decode_layout, params))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)
    position = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    response = work.response.astype(np.int64)
    seen = (response * work.length + response * (response - 1) // 2).sum()
    cache = int(seen) * position * jnp.dtype(c.dtype).itemsize
    steps = engine.steps / (rounds + 1)
    seconds = (weights * steps + cache) / bytes_per_second
    return {"steps": steps, "weight_bytes": weights, "cache_bytes": cache, "floor_seconds": seconds}


def summary(
    work: Workload,
    programs: int,
    engine: Statistics,
    contestants: list[Contestant],
    on_cpu: bool = True,
) -> Row:
    """Return the reported figures of a workload.

    Ratios are of rates at the median time, in CPU seconds on a CPU unless their name says
    otherwise. Those to Hugging Face compare the best of each, over one core or thread and several.
    """
    usual, ours = "cpu" if on_cpu else "wall", contestants[0]
    engines, static, hf = (
        [each for each in contestants if each.name.startswith(name)]
        for name in (ENGINE, STATIC, "hf")
    )

    def ratio(mine: list[Contestant], others: list[Contestant], clock: str = usual) -> float | None:
        if not others:
            return None
        return max(e.rate(clock) for e in mine) / max(each.rate(clock) for each in others)

    return {
        "workload": work.name,
        "useful_tokens": work.tokens,
        "cpu_seconds": statistics.median(ours.cpu),
        "wall_seconds": statistics.median(ours.wall),
        "useful_tokens_per_cpu_second": ours.rate("cpu"),
        "useful_tokens_per_second": ours.rate("wall"),
        "ratio_to_hf": ratio(engines, hf),
        "wall_ratio_to_hf": ratio(engines, hf, "wall"),
        "ratio_to_static": ratio([ours], static),
        "programs": programs,
        "slot_use": engine.slot_use,
        "compile_seconds": engine.compile_seconds,
        "contestants": [
            {
                "name": each.name,
                "useful_tokens": each.tokens,
                "cpu_seconds": statistics.median(each.cpu),
                "wall_seconds": statistics.median(each.wall),
                "all_cpu": each.cpu,
                "all_wall": each.wall,
            }
            for each in contestants
        ],
    }


def print_table(result: Row) -> None:
    """Print the figures."""
    console = Console()
    for row in result["workloads"]:
        table = Table(title=f"{row['workload']}: {row['useful_tokens']} tokens")
        table.add_column("")
        for head in ("tokens", "CPU s", "tokens / CPU s", "s", "tokens / s"):
            table.add_column(head, justify="right")
        for each in row["contestants"]:
            tokens, cpu, wall = (
                each[key] for key in ("useful_tokens", "cpu_seconds", "wall_seconds")
            )
            table.add_row(
                each["name"],
                f"{tokens}",
                f"{cpu:.3f}",
                f"{tokens / cpu:.0f}",
                f"{wall:.3f}",
                f"{tokens / wall:.0f}",
            )
        console.print(table)
        ratios = {"static batch": row["ratio_to_static"], "Hugging Face": row["ratio_to_hf"]}
        told = [f"{value:.2f} x {name}, " for name, value in ratios.items() if value]
        console.print(
            f"engine: {''.join(told)}slots in use {row['slot_use']:.2f}, "
            f"{row['programs']} programs, compiled in {row['compile_seconds']:.1f} s"
        )
        if "floor_fraction" in row:
            console.print(
                f"to read weights and cache alone takes {row['floor_seconds']:.2f} s, "
                f"{row['floor_fraction']:.2f} of the time, at {result['bandwidth'] / 1e12:.2f} TB/s"
            )
