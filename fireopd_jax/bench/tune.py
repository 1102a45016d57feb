"""Time and scratch memory of the head statistics by block size, in a table by device kind.

    implementation -> candidate sizes -> one compiled program per size -> interleaved rounds -> rows

Nothing reads the table automatically: pass its sizes as `chunk=` or `blocks=` to the head
functions, or as `method.score.head_chunk` to a run.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fireopd_jax.bench.head import (
    MIB,
    Case,
    Row,
    Shape,
    check,
    choose,
    compile_case,
    make_inputs,
    measure,
    program,
    write_whole,
)
from fireopd_jax.config import UserError
from fireopd_jax.ops.blocks import Blocks, default_chunk
from fireopd_jax.ops.dispatch import KERNELS, PLAIN, PLATFORMS
from fireopd_jax.types import Array

CASES = (("teacher", "forward"), ("student", "forward_backward"))
CHUNKS = (1024, 2048, 4096, 8192, 16384)
GPU_COLUMNS = (64, 128, 192, 256)
"""All that the GPU kernels support; their other sizes are fixed."""
TPU_FACTORS = (
    (0.5, 1, 1),
    (2, 1, 1),
    (1, 0.5, 1),
    (1, 2, 1),
    (1, 1, 0.5),
    (1, 1, 2),
    (0.5, 2, 1),
    (2, 0.5, 1),
)
"""Factors of the default tokens, columns and width."""
DEFAULT_FILE = Path("head_blocks.json")
KINDS = "device kinds"
LONGEST_REASON = 160


@dataclasses.dataclass
class Trial:
    """One implementation with one choice of block sizes."""

    implementation: str
    role: str
    pass_name: str
    sizes: int | Blocks
    """Columns of a chunk, or the blocks of a kernel."""
    default: bool
    """Whether these are the default sizes."""
    case: Case | None = None
    reason: str = ""
    """Why `case` is None."""

    @property
    def seconds(self) -> float:
        """Median time in seconds; infinite if not measured."""
        return statistics.median(self.case.wall_s) if self.case else float("inf")


def tune_head(
    shape: Shape, implementations: list[str] | None, rounds: int, file: Path | None = None
) -> Row:
    """Measure each implementation at several block sizes, print a table, add it to the file.

    Returns the contents of the file, by default `head_blocks.json`. Raises UserError if nothing
    could be measured or the file is not such a table.
    """
    file = file or DEFAULT_FILE
    check(shape, rounds)
    if shape.chunk is not None:
        raise UserError("--chunk: has no effect with --tune, which measures several")
    if PLAIN in (implementations or ()):
        raise UserError(f"--implementations: {PLAIN} has no block sizes to measure")
    names = [name for name in choose(shape, implementations) if name != PLAIN]
    # Fail before measuring if the file is not such a table.
    read_table(file)
    inputs = make_inputs(shape)
    trials = [trial for name in dict.fromkeys(names) for trial in trials_of(shape, name)]
    for trial in trials:
        prepare(shape, trial, inputs)
    measure([trial.case for trial in trials if trial.case], rounds)
    groups = [(trial.implementation, trial.role) for trial in trials]
    trials.sort(key=lambda trial: (groups.index((trial.implementation, trial.role)), trial.seconds))
    print_trials(shape, trials)
    rows = [row(shape, trial) for trial in trials if trial.case]
    if not rows:
        raise UserError("--tune: none of these sizes compiled, nothing is written")
    table = merged(read_table(file), jax.devices()[0].device_kind, rows)
    write_whole(file, json.dumps(table, indent=2) + "\n")
    print(f"wrote {file}")
    return table


def trials_of(shape: Shape, name: str) -> list[Trial]:
    """Return the trials of one implementation."""
    return [
        Trial(name, role, pass_name, sizes, default=index == 0)
        for role, pass_name in CASES
        for index, sizes in enumerate(candidates(shape, name, role))
    ]


def candidates(shape: Shape, name: str, role: str) -> Sequence[int | Blocks]:
    """Return the block sizes to try, the default first."""
    if name not in KERNELS:
        chunks = (default_chunk(shape.tokens, shape.width, larger=True), *CHUNKS)
        return list(dict.fromkeys(min(chunk, shape.vocabulary) for chunk in chunks))
    k = shape.k if role == "teacher" else 0
    own = KERNELS[name].default_blocks(shape.tokens, shape.width, shape.vocabulary, k, shape.dtype)
    if PLATFORMS[name] == "gpu":
        others = [dataclasses.replace(own, vocabulary=columns) for columns in GPU_COLUMNS]
    else:
        sizes = (own.tokens, own.vocabulary, own.width)
        others = [
            Blocks(*(int(size * factor) for size, factor in zip(sizes, factors, strict=True)))
            for factors in TPU_FACTORS
        ]
    return list(dict.fromkeys([own, *others]))


def prepare(shape: Shape, trial: Trial, inputs: tuple[Array, ...]) -> None:
    """Compile and run the trial once, or record why it cannot run."""
    blocks = trial.sizes if isinstance(trial.sizes, Blocks) else None
    chunk = trial.sizes if isinstance(trial.sizes, int) else None
    shape = dataclasses.replace(shape, chunk=chunk)
    function = program(shape, trial.implementation, trial.role, trial.pass_name, blocks)
    try:
        case = compile_case(function, inputs)
        jax.block_until_ready(case.run())
    # Compilers and devices raise many kinds of exceptions for sizes that are too large.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = len(reason) <= LONGEST_REASON
        trial.reason = reason if short else reason[:LONGEST_REASON] + " ..."
    else:
        trial.case = case


def row(shape: Shape, trial: Trial) -> Row:
    """Return the table row of a measured trial."""
    assert trial.case is not None
    of_shape = {name: size for name, size in vars(shape).items() if name != "chunk"}
    if isinstance(trial.sizes, Blocks):
        sizes = {"blocks": dataclasses.asdict(trial.sizes)}
    else:
        sizes = {"chunk": trial.sizes}
    return {
        "implementation": trial.implementation,
        "role": trial.role,
        "pass": trial.pass_name,
        "shape": of_shape,
        **sizes,
        "default": trial.default,
        "seconds": trial.seconds,
        "scratch_mib": trial.case.scratch_bytes / MIB,
        # Rows that stay in the file may come from another release.
        "jax": jax.__version__,
    }


def read_table(file: Path) -> Row:
    """Return the table in the file, empty if there is none; raise UserError if it is no table."""
    wanted = f'expected a table of `bench head --tune`, {{"{KINDS}": ...}}; name another file'
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: {wanted} with --json ({reason})") from None
    if not _is_table(table):
        raise UserError(f"{file}: {wanted} with --json")
    return table


def _is_table(table: Any) -> bool:
    kinds = table.get(KINDS) if isinstance(table, dict) else None
    if not isinstance(kinds, dict):
        return False
    entries = [each if isinstance(each, dict) else {} for each in kinds.values()]
    rows = [each.get("rows") for each in entries]
    needed = {"implementation", "role", "pass", "shape"}
    return all(
        isinstance(some, list) and all(isinstance(r, dict) and needed <= r.keys() for r in some)
        for some in rows
    )


def merged(table: Row, kind: str, rows: list[Row]) -> Row:
    """Return the table with `rows` added to a device kind.

    They replace rows of the same implementation, role, pass and shape only.
    """
    kinds = table.get(KINDS, {})
    before = kinds.get(kind, {})
    measured = {_identity(each) for each in rows}
    kept = [each for each in before.get("rows", []) if _identity(each) not in measured]
    entry = {**before, "jax": jax.__version__, "rows": [*kept, *rows]}
    return {**table, KINDS: {**kinds, kind: entry}}


def _identity(row: Row) -> str:
    """Return the key of the rows whose sizes are compared with one another."""
    names = ("implementation", "role", "pass", "shape")
    return json.dumps([row[name] for name in names], sort_keys=True)


def print_trials(shape: Shape, trials: Sequence[Trial]) -> None:
    """Print all trials, fastest first within each implementation and role."""
    table = Table(
        title=f"N {shape.tokens}, D {shape.width}, V {shape.vocabulary}, K {shape.k}, "
        f"{shape.dtype}, {jax.devices()[0].device_kind}"
    )
    for column in ("implementation", "role", "pass", "sizes", "default"):
        table.add_column(column, no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("scratch MiB", justify="right")
    table.add_column("not measured because")
    for each in trials:
        measured = ("-", "-")
        if each.case:
            measured = (f"{each.seconds:.4f}", f"{each.case.scratch_bytes / MIB:.1f}")
        table.add_row(
            each.implementation,
            each.role,
            each.pass_name,
            described(each.sizes),
            "yes" if each.default else "",
            *measured,
            # `Text`, because a compiler message is not markup.
            Text(each.reason),
        )
    # A pipe has no width; do not truncate the numbers.
    Console(width=max(Console().width, 160)).print(table)


def described(sizes: int | Blocks) -> str:
    """Return the sizes as keyword arguments."""
    if isinstance(sizes, int):
        return f"chunk={sizes}"
    return " ".join(f"{name}={size}" for name, size in vars(sizes).items() if size is not None)
