"""Time and scratch memory of attention by its implementations, forward and with gradients.

    lengths x implementations -> compiled programs -> interleaved rounds -> medians -> rows

One full row of one segment, 8 query heads and 4 key heads. Rounds are
interleaved, as in `bench.head`. A program whose scratch would exceed `LARGEST_SCRATCH` is compiled
but not run: its `seconds` are null.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from fireopd_jax.bench.head import DTYPES, MIB, Case, Row, compile_case, measure, write_whole
from fireopd_jax.config import UserError
from fireopd_jax.ops.attention import IMPLEMENTATIONS, KERNELS, PLATFORMS, attention
from fireopd_jax.types import Array

SHORTEST = 512
LARGEST_SCRATCH = 4 * 2**30
"""Bytes; scores of the reference at 32,768 tokens would be 32 GiB, several times over."""
PASSES = ("forward", "forward_backward")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and dtype of the measured inputs."""

    tokens_max: int = 32768
    heads: int = 8
    key_heads: int = 4
    width: int = 64
    dtype: str = "float32"


def bench_attention(shape: Shape, rounds: int, file: Path | None = None) -> Row:
    """Measure each implementation that runs here, print a table, write JSON, return its contents.

    Raises UserError for options that cannot be measured.
    """
    check(shape, rounds)
    cases: dict[tuple[str, str, int], Case] = {}
    for tokens in lengths(shape):
        inputs = make_inputs(shape, tokens)
        for name in runnable(shape, tokens):
            for pass_name in PASSES:
                cases[name, pass_name, tokens] = compile_case(program(name, pass_name), inputs)
    timed = {key: case for key, case in cases.items() if case.scratch_bytes <= LARGEST_SCRATCH}
    measure(timed.values(), rounds)
    result = {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "rows": [row(key, case) for key, case in cases.items()],
    }
    if file is not None:
        write_whole(file, json.dumps(result, indent=2) + "\n")
    print_table(result)
    return result


def check(shape: Shape, rounds: int) -> None:
    """Raise UserError for options that cannot be measured."""
    if shape.tokens_max < SHORTEST:
        raise UserError(f"--tokens-max: expected at least {SHORTEST}, got {shape.tokens_max}")
    if rounds < 1:
        raise UserError(f"--rounds: expected at least 1, got {rounds}")
    if shape.dtype not in DTYPES:
        raise UserError(f"--dtype: expected {' or '.join(DTYPES)}, got {shape.dtype!r}")


def lengths(shape: Shape) -> list[int]:
    """Return 512 and its doublings up to the largest number of tokens."""
    doublings = (shape.tokens_max // SHORTEST).bit_length()
    return [SHORTEST * 2**doubling for doubling in range(doublings)]


def runnable(shape: Shape, tokens: int) -> list[str]:
    """Return the implementations that support the shape on this machine."""
    sizes = (tokens, shape.heads, shape.key_heads, shape.width, shape.dtype, None)
    platform = jax.default_backend()

    def runs(name: str) -> bool:
        if PLATFORMS.get(name, platform) != platform:
            return False
        return name not in KERNELS or not KERNELS[name].unsupported_reason(*sizes)

    return [name for name in IMPLEMENTATIONS if runs(name)]


def make_inputs(shape: Shape, tokens: int) -> tuple[Array, Array, Array, Array]:
    """Return random q, k, v and the segments of one full row."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, tokens, shape.heads, shape.width), shape.dtype)
    k, v = (
        jax.random.normal(key, (1, shape.key_heads, tokens, shape.width), shape.dtype)
        for key in keys[1:]
    )
    return q, k, v, jnp.ones((1, tokens), jnp.int32)


def program(name: str, pass_name: str):
    """Return the function to compile: attention alone, or with the gradient to q, k and v."""

    def forward(q, k, v, segments):
        return attention(q, k, v, segments, implementation=name)

    def loss(q, k, v, segments):
        return (forward(q, k, v, segments).astype(jnp.float32) ** 2).sum()

    return forward if pass_name == "forward" else jax.value_and_grad(loss, argnums=(0, 1, 2))


def row(key: tuple[str, str, int], case: Case) -> Row:
    """Return the medians of a case; null where it was not run."""
    name, pass_name, tokens = key
    return {
        "implementation": name,
        "pass": pass_name,
        "tokens": tokens,
        "seconds": statistics.median(case.wall_s) if case.wall_s else None,
        "cpu_seconds": statistics.median(case.cpu_s) if case.cpu_s else None,
        "scratch_mib": case.scratch_bytes / MIB,
    }


def print_table(result: Row) -> None:
    """Print the rows."""
    shape = result["shape"]
    table = Table(
        title=f"{shape['heads']} heads, {shape['key_heads']} of keys, H {shape['width']}, "
        f"{shape['dtype']}, {result['device']}"
    )
    for column in ("implementation", "pass"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "s", "CPU s", "scratch MiB"):
        table.add_column(column, justify="right")
    for each in result["rows"]:
        times = (each["seconds"], each["cpu_seconds"])
        table.add_row(
            each["implementation"],
            each["pass"],
            str(each["tokens"]),
            *("-" if time is None else f"{time:.4f}" for time in times),
            f"{each['scratch_mib']:.1f}",
        )
    # A pipe has no width; do not truncate the numbers.
    console = Console(width=max(Console().width, 100))
    console.print(table)
    left_out = [each for each in result["rows"] if each["seconds"] is None]
    if left_out:
        names = ", ".join(dict.fromkeys(each["implementation"] for each in left_out))
        console.print(
            f"{names}: compiled, not run from {min(each['tokens'] for each in left_out)} tokens "
            f"on, where more than {LARGEST_SCRATCH // MIB} MiB of scratch are needed."
        )
