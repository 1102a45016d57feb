"""Time and scratch memory of the head statistics by block size, in a table by kind of device.

    implementation -> candidate sizes -> one compiled program a size -> interleaved rounds -> rows

Nothing reads the table. Who wants its sizes passes them on: as `chunk=` or `blocks=` to the head
functions, as `method.score.head_chunk` to a run.
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
"""All that the GPU kernels take; their other sizes are fixed."""
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
"""Of the formula's tokens, columns and width."""
DEFAULT_FILE = Path("head_blocks.json")
KINDS = "device kinds"
LONGEST_REASON = 160


@dataclasses.dataclass
class Trial:
    """One implementation with one choice of sizes."""

    implementation: str
    role: str
    way: str
    sizes: int | Blocks
    """Columns of a chunk, or the blocks of a kernel."""
    default: bool
    """The formula's own choice."""
    case: Case | None = None
    reason: str = ""
    """Why there is no case."""

    @property
    def seconds(self) -> float:
        """The median; infinite where nothing was measured."""
        return statistics.median(self.case.wall_s) if self.case else float("inf")


def tune_head(
    shape: Shape, implementations: list[str] | None, rounds: int, file: Path | None = None
) -> Row:
    """Measure each implementation over its sizes, print a table, add it to the file.

    Returns what the file then holds, `head_blocks.json` where none is named.
    """
    file = file or DEFAULT_FILE
    check(shape, rounds)
    if shape.chunk is not None:
        raise UserError("--chunk: has no effect with --tune, which measures several")
    if PLAIN in (implementations or ()):
        raise UserError(f"--implementations: {PLAIN} has no block sizes to measure")
    names = [name for name in choose(shape, implementations) if name != PLAIN]
    # A file that cannot take the rows is refused before they cost anything.
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
    """List what is to be measured of one implementation."""
    return [
        Trial(name, role, way, sizes, default=index == 0)
        for role, way in CASES
        for index, sizes in enumerate(candidates(shape, name, role))
    ]


def candidates(shape: Shape, name: str, role: str) -> Sequence[int | Blocks]:
    """List sizes to try, the formula's own first."""
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
    """Compile and run once, or note why that cannot be done."""
    blocks = trial.sizes if isinstance(trial.sizes, Blocks) else None
    chunk = trial.sizes if isinstance(trial.sizes, int) else None
    shape = dataclasses.replace(shape, chunk=chunk)
    function = program(shape, trial.implementation, trial.role, trial.way, blocks)
    try:
        case = compile_case(function, inputs)
        jax.block_until_ready(case.run())
    # What is too large for a compiler or a device is said in exceptions of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        short = len(reason) <= LONGEST_REASON
        trial.reason = reason if short else reason[:LONGEST_REASON] + " ..."
    else:
        trial.case = case


def row(shape: Shape, trial: Trial) -> Row:
    """Give a measured trial as it is written."""
    assert trial.case is not None
    of_shape = {name: size for name, size in vars(shape).items() if name != "chunk"}
    if isinstance(trial.sizes, Blocks):
        sizes = {"blocks": dataclasses.asdict(trial.sizes)}
    else:
        sizes = {"chunk": trial.sizes}
    return {
        "implementation": trial.implementation,
        "role": trial.role,
        "pass": trial.way,
        "shape": of_shape,
        **sizes,
        "default": trial.default,
        "seconds": trial.seconds,
        "scratch_mib": trial.case.scratch_bytes / MIB,
        # Rows that are kept may come from another release.
        "jax": jax.__version__,
    }


def read_table(file: Path) -> Row:
    """Read what earlier runs have written; no file is an empty table."""
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
    """Add rows of a kind of device; they replace those of the same shape, role and name only."""
    kinds = table.get(KINDS, {})
    before = kinds.get(kind, {})
    measured = {_identity(each) for each in rows}
    kept = [each for each in before.get("rows", []) if _identity(each) not in measured]
    entry = {**before, "jax": jax.__version__, "rows": [*kept, *rows]}
    return {**table, KINDS: {**kinds, kind: entry}}


def _identity(row: Row) -> str:
    """What sizes are compared within."""
    names = ("implementation", "role", "pass", "shape")
    return json.dumps([row[name] for name in names], sort_keys=True)


def print_trials(shape: Shape, trials: Sequence[Trial]) -> None:
    """Print all trials, of each implementation and role the fastest first."""
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
            each.way,
            described(each.sizes),
            "yes" if each.default else "",
            *measured,
            # A message of a compiler is no markup.
            Text(each.reason),
        )
    # A pipe has no width of its own, and the numbers are the point.
    Console(width=max(Console().width, 160)).print(table)


def described(sizes: int | Blocks) -> str:
    """Name sizes as a caller passes them."""
    if isinstance(sizes, int):
        return f"chunk={sizes}"
    return " ".join(f"{name}={size}" for name, size in vars(sizes).items() if size is not None)
