"""Time and scratch memory of the head statistics, against full logits and a bare product.

    shape -> inputs -> one compiled program per case -> interleaved rounds -> medians -> rows

The baseline "naive" is the implementation "reference": full logits and `lax.top_k`, compiled like
the others, on the same inputs. Rounds are interleaved, so that a slow period of the machine affects
all cases alike.
"""

import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from fireopd_jax.config import UserError, nearest
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.dispatch import IMPLEMENTATIONS, KERNELS, PLAIN, PLATFORMS
from fireopd_jax.ops.head import LARGEST_K, HeadGather, head_gather, head_topk
from fireopd_jax.ops.logits import dot
from fireopd_jax.types import Array

NAIVE = PLAIN
DTYPES = ("bfloat16", "float32")
CASES = (("teacher", "forward"), ("student", "forward"), ("student", "forward_backward"))
MIB = 2**20

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and dtype of the measured inputs."""

    tokens: int
    width: int
    vocabulary: int
    k: int
    dtype: str
    chunk: int | None = None


@dataclasses.dataclass
class Case:
    """A compiled program and its measured times, in seconds."""

    run: Callable[[], Any]
    scratch_bytes: int
    wall_s: list[float] = dataclasses.field(default_factory=list)
    cpu_s: list[float] = dataclasses.field(default_factory=list)

    def round(self) -> None:
        """Run the program once, to its end, and record the times."""
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(self.run())
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)


def bench_head(
    shape: Shape, implementations: list[str] | None, rounds: int, file: Path | None = None
) -> Row:
    """Measure each implementation, print a table, write JSON and return its contents.

    `implementations=None` means all that run on this machine. Raises UserError for options that
    cannot be measured.
    """
    check(shape, rounds)
    names = list(dict.fromkeys([NAIVE, *choose(shape, implementations)]))
    inputs = make_inputs(shape)
    matmul = compile_case(lambda hidden, head, ids, support: product(hidden, head), inputs)
    cases = {
        (name, role, pass_name): compile_case(program(shape, name, role, pass_name), inputs)
        for name in names
        for role, pass_name in CASES
    }
    measure([matmul, *cases.values()], rounds)
    matmul_s = statistics.median(matmul.wall_s)
    result = {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "matmul_seconds": matmul_s,
        "rows": [row(key, case, cases, matmul_s) for key, case in cases.items()],
    }
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    print_table(result)
    return result


def measure(cases: Iterable[Case], rounds: int) -> None:
    """Run each case once unmeasured, then `rounds` times, in shuffled order."""
    cases = list(cases)
    for case in cases:
        jax.block_until_ready(case.run())
    order = random.Random(0)
    for _ in range(rounds):
        # A program that follows one that frees a gigabyte is slower: shuffle, so that it varies.
        for case in order.sample(cases, len(cases)):
            case.round()


def choose(shape: Shape, implementations: list[str] | None) -> list[str]:
    """Return the implementations to measure: the named ones, or all that run on this machine.

    Raises UserError for a named one that is unknown or cannot run.
    """
    platform = jax.default_backend()
    here = [name for name in IMPLEMENTATIONS if PLATFORMS.get(name, platform) == platform]
    if implementations is None:
        reasons = {name: unsupported_reason(shape, name) for name in here}
        for name, reason in reasons.items():
            if reason:
                print(f"{name} is left out: {reason}")
        return [name for name, reason in reasons.items() if reason is None]
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            known = sorted(IMPLEMENTATIONS)
            raise UserError(
                f"--implementations: unknown {name!r}{nearest(name, known)}; "
                f"known: {', '.join(known)}"
            )
        if name not in here:
            raise UserError(
                f"--implementations: {name} runs on {PLATFORMS[name].upper()} only, this machine "
                f"has {platform.upper()}; here run: {', '.join(here)}"
            )
        if reason := unsupported_reason(shape, name):
            raise UserError(f"--implementations: {name} does not support this: {reason}")
    return list(implementations)


def unsupported_reason(shape: Shape, name: str) -> str | None:
    """Return why a kernel does not support the shape, as teacher or as student, or None."""
    if name not in KERNELS:
        return None
    reason_for, sizes = (
        KERNELS[name].unsupported_reason,
        (shape.tokens, shape.width, shape.vocabulary),
    )
    of_teacher = reason_for(*sizes, 0, shape.k, shape.dtype)
    return of_teacher or reason_for(*sizes, shape.k, 0, shape.dtype)


def check(shape: Shape, rounds: int) -> None:
    """Raise UserError for a shape or number of rounds that cannot be measured."""
    if shape.dtype not in DTYPES:
        raise UserError(f"--dtype: expected {' or '.join(DTYPES)}, got {shape.dtype!r}")
    for option, value in (
        ("--tokens", shape.tokens),
        ("--width", shape.width),
        ("--vocab", shape.vocabulary),
        ("--rounds", rounds),
    ):
        if value < 1:
            raise UserError(f"{option}: expected at least 1, got {value}")
    if not 1 <= shape.k <= LARGEST_K:
        raise UserError(f"--top-k: expected 1 to {LARGEST_K}, got {shape.k}")
    if shape.chunk is not None and shape.chunk < 1:
        raise UserError(f"--chunk: expected at least 1, got {shape.chunk}")


def make_inputs(shape: Shape) -> tuple[Array, Array, Array, Array]:
    """Return random inputs whose logits have standard deviation 2.5, as in trained models."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.width), shape.dtype)
    head = jax.random.normal(keys[1], (shape.vocabulary, shape.width), shape.dtype)
    head = head * jnp.asarray(2.5 * shape.width**-0.5, shape.dtype)
    ids = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocabulary)
    support = jax.random.randint(keys[3], (shape.tokens, shape.k), 0, shape.vocabulary)
    return hidden, head, ids, support


def product(hidden: Array, head: Array) -> Array:
    """Return the bare logits in the dtype of the inputs."""
    return dot(hidden, head, (1, 1)).astype(hidden.dtype)


def program(
    shape: Shape, name: str, role: str, pass_name: str, blocks: Blocks | None = None
) -> Callable[..., Any]:
    """Return the function to compile: teacher or student, forward or with gradients."""
    options = {"implementation": name, "chunk": shape.chunk, "blocks": blocks}

    def teacher(hidden, head, ids, support):
        return head_topk(hidden, head, ids, k=shape.k, **options)

    def student(hidden, head, ids, support):
        return head_gather(hidden, head, ids, support, **options)

    def loss(hidden, head, ids, support):
        return of_token(student(hidden, head, ids, support)).mean()

    if role == "teacher":
        return teacher
    return student if pass_name == "forward" else jax.value_and_grad(loss, argnums=(0, 1))


def of_token(stats: HeadGather) -> Array:
    """Return the loss of each token: each output has a gradient, none a multiple of another."""
    by_id = stats.logprob + stats.support_logprob.mean(axis=-1)
    return by_id + 0.1 * stats.entropy + 0.01 * stats.logsumexp


def compile_case(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Case:
    """Return the program compiled for the inputs, and the scratch bytes planned for it."""
    compiled = jax.jit(function).lower(*inputs).compile()
    analysis = compiled.memory_analysis()
    return Case(lambda: compiled(*inputs), getattr(analysis, "temp_size_in_bytes", 0))


def row(key: tuple[str, str, str], case: Case, cases: dict[Any, Case], matmul_s: float) -> Row:
    """Return the medians of a case and their ratios to the naive case and the bare product."""
    name, role, pass_name = key
    naive = cases[(NAIVE, role, pass_name)]
    seconds = statistics.median(case.wall_s)
    return {
        "implementation": name,
        "role": role,
        "pass": pass_name,
        "seconds": seconds,
        "cpu_seconds": statistics.median(case.cpu_s),
        "scratch_mib": case.scratch_bytes / MIB,
        "ratio_to_naive_seconds": seconds / statistics.median(naive.wall_s),
        # Avoid 0 / 0 where the compiler plans no scratch.
        "ratio_to_naive_scratch": case.scratch_bytes / max(naive.scratch_bytes, 1),
        "ratio_to_matmul": seconds / matmul_s,
    }


def write_whole(file: Path, text: str) -> None:
    """Write a file atomically: to a temporary file beside it, then rename."""
    part = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error


def print_table(result: Row) -> None:
    """Print the rows."""
    shape = result["shape"]
    table = Table(
        title=f"N {shape['tokens']}, D {shape['width']}, V {shape['vocabulary']}, "
        f"K {shape['k']}, {shape['dtype']}, {result['device']}; "
        f"matmul {result['matmul_seconds']:.4f} s"
    )
    for column in ("implementation", "role", "pass"):
        table.add_column(column, no_wrap=True)
    for column in ("s", "CPU s", "scratch MiB", "/ naive s", "/ naive scratch", "/ matmul"):
        table.add_column(column, justify="right")
    for each in result["rows"]:
        table.add_row(
            each["implementation"],
            each["role"],
            each["pass"],
            f"{each['seconds']:.4f}",
            f"{each['cpu_seconds']:.4f}",
            f"{each['scratch_mib']:.1f}",
            f"{each['ratio_to_naive_seconds']:.2f}",
            f"{each['ratio_to_naive_scratch']:.3f}",
            f"{each['ratio_to_matmul']:.2f}",
        )
    # A pipe has no width; do not truncate the numbers.
    Console(width=max(Console().width, 120)).print(table)
