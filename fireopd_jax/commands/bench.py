"""`fireopd bench ...`: benchmarks of parts of the package."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fireopd_jax.config import UserError

bench = typer.Typer(help="Benchmark a part of the package.", no_args_is_help=True)


@bench.command("attention")
def bench_attention(
    tokens_max: Annotated[int, typer.Option(help="Longest row; from 512 by doubling.")] = 32768,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Interleaved; medians are reported.")] = 3,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time attention by its implementations, and the memory that their programs need."""
    from fireopd_jax.bench.attention import Shape, bench_attention

    bench_attention(Shape(tokens_max=tokens_max, dtype=dtype), rounds, file)


@bench.command("head")
def bench_head(
    tokens: Annotated[int, typer.Option(help="Number of tokens.")] = 2048,
    width: Annotated[int, typer.Option(help="Width of the hidden states.")] = 256,
    vocab: Annotated[int, typer.Option(help="Vocabulary size.")] = 32768,
    top_k: Annotated[int, typer.Option(help="Token ids per position, 1 to 128.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    implementations: Annotated[
        str | None, typer.Option(metavar="A,B", help="By default all that run on this machine.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved; medians are reported.")] = 7,
    chunk: Annotated[
        int | None, typer.Option(help="Columns of logits at a time, if not the default.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Time block sizes instead; the table is not used by default."),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option("--json", help="File to write; with --tune, missing entries are added."),
    ] = None,
) -> None:
    """Time the head statistics against full logits with `lax.top_k` and the product alone."""
    from fireopd_jax.bench.head import Shape, bench_head
    from fireopd_jax.bench.tune import tune_head

    shape = Shape(tokens, width, vocab, top_k, dtype, chunk)
    names = implementations and [name.strip() for name in implementations.split(",")]
    (tune_head if tune else bench_head)(shape, names or None, rounds, file)


@bench.command("load")
def bench_load(
    folder: Annotated[
        Path | None, typer.Argument(help="Hugging Face folder; by default random weights.")
    ] = None,
    gib: Annotated[float, typer.Option(help="Size of the random weights, in bfloat16.")] = 2.0,
    dtype: Annotated[
        str | None,
        typer.Option(help="Parameters in float32 or bfloat16; by default as in the files."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Medians are reported.")] = 3,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time loading against reading the files, and compilation of deep and shallow models."""
    from fireopd_jax.bench.load import bench_load

    bench_load(folder, gib, dtype, rounds, file=file)


@bench.command("methods")
def bench_methods(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml | key=value]...", help="By default quickstart."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of configs/method/; opd is added.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; medians are reported.")] = 7,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time score and update of the methods, relative to those of on-policy distillation."""
    from fireopd_jax.bench.methods import bench_methods

    names = methods and [name.strip() for name in methods.split(",")]
    bench_methods(settings or ["quickstart"], names or None, rounds, file)


@bench.command("rollout")
def bench_rollout(
    compare: Annotated[
        str | None, typer.Option(help="hf: also time Hugging Face `generate`; needs PyTorch.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Responses decoded at a time.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; medians are reported.")] = 5,
    model: Annotated[
        str, typer.Option(help="small, qwen3-0.6b or qwen3-1.7b, with random weights.")
    ] = "small",
    cache: Annotated[
        str, typer.Option(help="dense; paged (64-token pages); on a GPU dense_gpu, paged_gpu.")
    ] = "dense",
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time rollouts of varying lengths, with `small` also of equal ones, in tokens per second."""
    # Read when PyTorch starts its threads: waiting threads must not use CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if compare is not None:  # JAX would take most of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    from fireopd_jax.bench.rollout import bench_rollout

    bench_rollout(compare, slots, rounds, file, model, cache)


@bench.command("step")
def bench_step(
    model: Annotated[
        str, typer.Option(help="small, qwen3-0.6b or qwen3-1.7b, with random weights.")
    ] = "small",
    lengths: Annotated[
        str, typer.Option(help="equal, heavy-tailed, or nano: 100 to 1,024 tokens in and out.")
    ] = "equal",
    rows: Annotated[
        int | None, typer.Option(help="Responses of a step, 5 or more; by default 8, 64 or 256.")
    ] = None,
    fill: Annotated[
        float | None,
        typer.Option(help="Real tokens over padded ones, by scaling the lengths; 0.1, say."),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Rows in score and update: packed, padded, or both, interleaved.")
    ] = "packed",
    student_scores: Annotated[
        str | None,
        typer.Option(help="decode or forward: their source; by default as training chooses."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="trl: also time a step of TRL's GKDTrainer.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; medians are reported.")] = 5,
    result_line: Annotated[
        bool,
        typer.Option(
            "--result-line",
            help="End with a line `RESULT {...}`; BENCH_THREADS in the environment limits cores.",
        ),
    ] = False,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Time one training step of FiRe-OPD, stage by stage, against its bare matrix products."""
    if result_line and (threads := os.environ.get("BENCH_THREADS")):
        limit_cores(threads)
    from fireopd_jax.bench.step import Options, bench_step

    options = Options(model, lengths, rows, fill, layout, student_scores, compare)
    bench_step(options, rounds, file, result_line=result_line)


def limit_cores(threads: str) -> None:
    """Limit this process to so many cores, before JAX starts as many threads as it may use."""
    if not threads.isdecimal() or int(threads) < 1:
        raise UserError(f"BENCH_THREADS={threads}: expected a number of threads")
    if hasattr(os, "sched_setaffinity"):  # not on every operating system
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])


@bench.command("toy")
def bench_toy(
    iterations: Annotated[
        int, typer.Option(help="Iterations of the student; teachers have 3/2 as many.")
    ] = 2000,
    seeds: Annotated[str, typer.Option(metavar="A,B", help="One study per seed.")] = "42,43,2026",
    figure: Annotated[Path | None, typer.Option(help="SVG to write.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Measure the gradient's variance as a function of gamma in 1-D (arXiv 2603.25562)."""
    from fireopd_jax.bench.toy_study import bench_toy, read_seeds

    bench_toy(iterations, read_seeds(seeds), figure, file)
