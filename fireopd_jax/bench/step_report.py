"""Figures of the step benchmark: medians of the stages, their floors, tables and the last line.

rounds of steps, of bare products, of TRL -> rows -> table, `RESULT {...}`
"""

import os
import statistics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.floor import Floor
from fireopd_jax.bench.head import MIB, Case
from fireopd_jax.bench.step_stages import METHOD, STAGES, TrainingStep
from fireopd_jax.bench.workload import Workload
from fireopd_jax.models.work import Work

Row = dict[str, Any]


def usable_cores() -> int | None:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() if affinity is None else len(affinity(0))


def seconds_of(case: Case, clock: str) -> float:
    """Return the median seconds of a case by the clock, "cpu" or "wall"."""
    return statistics.median(case.cpu_s if clock == "cpu" else case.wall_s)


def layout_row(
    step: TrainingStep, floors: dict[str, list[Floor]], speed: float, clock: str, peak: float
) -> Row:
    """Return the figures of a step of one layout: medians of the stages, and of the whole step."""
    stages = [stage_row(step, name, floors[name], speed, clock) for name in STAGES]
    cpu, wall = ([sum(each) for each in zip(*parts, strict=True)] for parts in _by_clock(step))
    floor = sum(each["floor_seconds"] for each in stages)
    flops = sum(each["flops"] for each in stages)
    cpu_s, wall_s = statistics.median(cpu), statistics.median(wall)
    spent = cpu_s if clock == "cpu" else wall_s
    return {
        "layout": step.layout,
        "student_scores": step.method.score.student,
        "score_pass": str(step.score_choice),
        "update_pass": f"{step.update_choice}, remat={step.update_choice.remat}",
        "cpu_seconds": cpu_s,
        "wall_seconds": wall_s,
        "tokens_per_second": step.work.tokens / wall_s,
        "flops": flops,
        "flop_use": flops / speed / spent,
        "floor_seconds": floor,
        "ratio_to_floor": spent / floor,
        "peak_rss_mib": peak,
        "kept_fraction": float(np.mean(step.kept)),
        "stages": stages,
        "seconds": {"cpu": cpu, "wall": wall},
    }


def _by_clock(step: TrainingStep) -> tuple[list[list[float]], list[list[float]]]:
    """Return the CPU seconds of each stage, and the wall-clock seconds, by round."""
    return [step.seconds[n][0] for n in STAGES], [step.seconds[n][1] for n in STAGES]


def stage_row(step: TrainingStep, name: str, floors: list[Floor], speed: float, clock: str) -> Row:
    """Return the medians of a stage; a stage that does not run takes and needs nothing."""
    work, setup = step.work, step.setup
    cpu, wall = (statistics.median(each) for each in step.seconds[name])
    whole = Work.of(work.length, work.response)
    model, times, share = setup.student.model, 1.0, 1.0
    if name == "score_teacher":
        model = setup.teachers[0].model
    elif name == "score_student":
        times = share = 0.0 if step.decoded else 1.0
    elif name == "update":
        # Rows that the filter drops need no gradient.
        kept = [Work.of(work.length[rows], work.response[rows]) for rows in step.kept]
        flops = statistics.median(each.flops(model) for each in kept)
        share = flops / whole.flops(model)
        times = 3.0 * share
    flops = times * whole.flops(model)
    floor = share * sum(seconds_of(each.case, clock) * each.scale for each in floors)
    spent = cpu if clock == "cpu" else wall
    return {
        "stage": name,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "tokens_per_second": work.tokens / wall if times else None,
        "flops": flops,
        "flop_use": flops / speed / spent if times else None,
        "floor_seconds": floor,
        "ratio_to_floor": spent / floor if times else None,
        "scratch_mib": step.scratch(name) / MIB,
    }


def ratio_to_trl(row: Row, trl: list[Row], clock: str) -> float | None:
    """Return our seconds over those of the fastest TRL trainer; None without any."""
    key = f"{clock}_seconds"
    return row[key] / min(each[key] for each in trl) if trl else None


def packed_to_padded(rows: list[Row], clock: str) -> float | None:
    """Return the time of score and update of packed rows over that of padded ones, if both ran."""
    if len(rows) < 2:
        return None
    packed, padded = (_learning_seconds(row, clock) for row in rows)
    return packed / padded


def us_per_token(row: Row, work: Workload, clock: str) -> float:
    """Return the microseconds of score and update for each token of prompts and responses."""
    return 1e6 * _learning_seconds(row, clock) / (int(work.length.sum()) + work.tokens)


def _learning_seconds(row: Row, clock: str) -> float:
    stages = (each for each in row["stages"] if each["stage"] != "rollout")
    return sum(each[f"{clock}_seconds"] for each in stages)


def protocol(row: Row, work: Workload) -> Row:
    """Return what the last line says: each round's seconds, and the peak of memory."""
    wall = row["seconds"]["wall"]
    return {
        "mode": f"fireopd_{row['layout']}",
        "threads": usable_cores(),
        "seconds": wall,
        "cpu_s": row["seconds"]["cpu"],
        "tokens_per_s": [work.tokens / each for each in wall],
        "peak_rss_mib": row["peak_rss_mib"],
    }


def print_tables(result: Row) -> None:
    """Print a table for each layout, and the ratios."""
    sizes = result["workload"]
    console = Console(width=max(Console().width, 110))
    console.print(
        f"{sizes['lengths']}: {sizes['rows']} rows, {sizes['prompt_tokens']} + "
        f"{sizes['response_tokens']} tokens, fill {sizes['fill']:.2f}; {result['device']}, "
        f"{result['cores']} cores, {result['flops_per_second'] / 1e9:.0f} GFLOP/s "
        f"({result['flops_per_second_is']})"
    )
    for row in result["layouts"]:
        console.print(_table(row, result["clock"]))
        console.print(
            f"{row['layout']}: student scores from {row['student_scores']}, score "
            f"{row['score_pass']}, update {row['update_pass']}, "
            f"{row['kept_fraction']:.0%} of rows kept, peak {row['peak_rss_mib']:.0f} MiB"
        )
    for each in result["trl"]:
        console.print(
            f"TRL GKD, {each['threads']} threads: {each['cpu_seconds']:.3f} CPU s, "
            f"{each['wall_seconds']:.3f} s, peak {each['peak_rss_mib']:.0f} MiB"
        )
    console.print(f"score + update: {result['us_per_token']:.0f} us a token")
    for name, key in (("TRL", "ratio_to_trl"), ("packed to padded score + update", None)):
        value = result[key or "packed_to_padded"]
        if value is not None:
            console.print(f"{'step to ' if key else ''}{name}: {value:.2f}")


def _table(row: Row, clock: str) -> Table:
    """Return the table of a layout."""
    table = Table(title=f"{METHOD}, {row['layout']}")
    table.add_column("stage", no_wrap=True)
    for head in ("CPU s", "s", "tokens / s", "GFLOP", "FLOP use", f"floor, {clock} s", "/ floor"):
        table.add_column(head, justify="right")
    table.add_column("scratch, MiB", justify="right")
    for each in [*row["stages"], {"stage": "step", "scratch_mib": None, **row}]:
        told = (
            (each["tokens_per_second"], "{:.0f}"),
            (each["flops"] / 1e9, "{:.2f}"),
            (each["flop_use"], "{:.2f}"),
            (each["floor_seconds"], "{:.4f}"),
            (each["ratio_to_floor"], "{:.2f}"),
            (each["scratch_mib"], "{:.1f}"),
        )
        table.add_row(
            each["stage"],
            f"{each['cpu_seconds']:.4f}",
            f"{each['wall_seconds']:.4f}",
            *("-" if value is None else form.format(value) for value, form in told),
        )
    return table
