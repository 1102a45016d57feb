"""Cost of one step of each method: CPU seconds and scratch of score and update, relative to OPD.

    one configuration, random models, one rollout -> every method -> interleaved rounds -> medians

The rollout is not measured, since it costs all methods the same. CPU seconds are those of all
threads of the process, without compilation.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.head import write_whole
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import Config, load_config, with_method
from fireopd_jax.session.setup import Setup, set_up
from fireopd_jax.sharding.mesh import replicate, shard_rows
from fireopd_jax.training.programs import make_programs
from fireopd_jax.types import Prompts, Rollout

BASELINE = "opd"
METHODS = (BASELINE, "fire_opd", "local_support", "tail_bucket", "gkd", "minillm", "eopd", "tip")

Row = dict[str, Any]


@dataclasses.dataclass
class Contestant:
    """The compiled programs of a method and their CPU seconds by round."""

    name: str
    score: Callable[[], Any]
    update: Callable[[], Any]
    scratch: dict[str, int]
    """Bytes that each program needs beside its inputs and outputs."""
    seconds: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {"score": [], "update": []}
    )


def bench_methods(
    settings: Sequence[str], methods: Sequence[str] | None, rounds: int, file: Path | None
) -> Row:
    """Measure the methods, print a table, write JSON and return its contents."""
    config = load_config([*settings, "run.compare=[]"])
    names = list(dict.fromkeys([BASELINE, *(methods or METHODS)]))
    setup = set_up(config)
    rollout = random_rollout(setup)
    contestants = [contestant(setup, config, name, rollout) for name in names]
    for turn in range(rounds + 1):
        for each in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
            for part in ("score", "update"):
                start = time.process_time()
                jax.block_until_ready(getattr(each, part)())
                if turn:  # the first round is a warm-up
                    each.seconds[part].append(time.process_time() - start)
    result: Row = {
        "command": " ".join(["fireopd bench methods", *settings]),
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "rounds": rounds,
        "methods": [row(each, contestants[0]) for each in contestants],
    }
    print_table(result)
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    return result


def row(each: Contestant, baseline: Contestant) -> Row:
    """Return medians, and medians of the ratios to the baseline within each round."""
    out: Row = {"name": each.name, "scratch_bytes": each.scratch}
    for part, seconds in each.seconds.items():
        pairs = zip(seconds, baseline.seconds[part], strict=True)
        out[f"{part}_seconds"] = statistics.median(seconds)
        out[f"{part}_ratio"] = statistics.median(own / other for own, other in pairs)
    return out


def contestant(setup: Setup, config: Config, name: str, rollout: Rollout) -> Contestant:
    """Return a method's programs, compiled for the setup.

    Raises UserError for a method that grades or audits responses, because the rollout is random.
    """
    method = with_method(config, name).method
    if asked := sorted(method.asked_of_rollout):
        raise UserError(
            f"--methods {name}: needs {', '.join(asked)}, and the responses here are random"
        )
    programs = make_programs(setup, method, config.optim)
    key = jax.random.key(0)
    whole = [
        replicate(setup.mesh, jax.jit(spec.model.init)(jax.random.fold_in(key, i)))
        for i, spec in enumerate((setup.student, *setup.teachers))
    ]
    student, *others = whole
    teachers = [student] if method.teacher.own else others if method.teacher.resident else []
    base = student if method.score.needs_base else None
    stages = method.init(config.rollout.batch_size)
    score_inputs = student, teachers, rollout, jnp.float32(1), jnp.int32(0), stages, base
    score = programs.score.jitted.lower(*score_inputs).compile()
    batch, *_ = score(*score_inputs)
    judge = method.loss.judge(teachers, base)
    rest = batch, jnp.float32(1), None, judge
    # The update donates its input state and returns the next one.
    kept = [programs.init(jax.tree.map(jnp.copy, student))]
    jitted: Any = programs.update
    update = jitted.lower(kept[0], *rest).compile()

    def run_update() -> Any:
        kept[0], metrics = update(kept[0], *rest)
        return metrics

    scratch = {
        part: program.memory_analysis().temp_size_in_bytes
        for part, program in (("score", score), ("update", update))
    }
    return Contestant(name, lambda: score(*score_inputs), run_update, scratch)


def random_rollout(setup: Setup) -> Rollout:
    """Return a rollout of random tokens, with responses of half to all of the maximal length."""
    config, rng = setup.config, np.random.default_rng(0)
    rows, room = config.rollout.batch_size, config.rollout.max_tokens
    width, size = config.data.max_prompt_tokens, setup.student.model.size
    prompt = rng.integers(0, size, (rows, width)).astype(np.int32)
    length = np.full(rows, width, np.int32)
    index = np.arange(rows, dtype=np.int32)
    mask = np.arange(room)[None] < rng.integers(max(1, room // 2), room + 1, rows)[:, None]
    values = np.full((rows, room), -1.0, np.float32)
    teacher = (index % len(setup.teachers)).astype(np.int32)
    prompts = Prompts(prompt, length, prompt, length, teacher, index, index, index)
    rollout = Rollout(
        prompts=prompts,
        tokens=rng.integers(0, size, (rows, room)).astype(np.int32),
        mask=mask,
        logprob=values,
        model_logprob=values,
        finished=np.ones(rows, bool),
        version=np.zeros((rows, room), np.int32),
        writer=np.zeros((rows, room), np.int32),
    )
    return shard_rows(setup.mesh, rollout)


def print_table(result: Row) -> None:
    """Print one row per method."""
    table = Table(title=f"{result['command']}  ({result['platform']}, {result['rounds']} rounds)")
    for column in ("method", "score, CPU ms", "x opd", "update, CPU ms", "x opd", "scratch, MiB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for each in result["methods"]:
        scratch = max(each["scratch_bytes"].values())
        table.add_row(
            each["name"],
            f"{1000 * each['score_seconds']:.0f}",
            f"{each['score_ratio']:.2f}",
            f"{1000 * each['update_seconds']:.0f}",
            f"{each['update_ratio']:.2f}",
            f"{scratch / 2**20:.1f}",
        )
    Console(width=100).print(table)
