"""The command `fireopd verify`: run all comparisons, print their tables, report failures.

objectives, statistics, invariance -> rows -> tables, JSON -> whether all rows passed
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fireopd_jax.config import UserError
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.runtime.files import write_atomically
from fireopd_jax.verify import invariance, objectives, statistics
from fireopd_jax.verify.table import Row, print_table

Part = Callable[[], Iterable[Row]]

PARTS: Mapping[str, Part] = {
    "Objectives": objectives.rows,
    "Statistics": statistics.rows,
    "Methods: the loss, and the gradient under any cut of the batch": invariance.rows,
}


def verify(file: Path | None = None) -> bool:
    """Run all parts, print their tables, write the rows to `file`; return whether all passed."""
    if file is not None and not file.parent.is_dir():
        raise UserError(f"{file}: no such folder {str(file.parent)!r}")
    start = time.perf_counter()
    compile_cache()
    devices = jax.devices()
    where = f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}"
    rows: list[Row] = []
    for title, part in PARTS.items():
        found = list(part())
        print_table(f"{title} ({where})", found)
        rows += found
    failed = [row.name for row in rows if not row.passed]
    seconds = time.perf_counter() - start
    console = Console(width=120, highlight=False, markup=False)
    console.print(f"{len(rows) - len(failed)} of {len(rows)} passed, {where}, {seconds:.0f} s")
    for name in failed:
        console.print(f"failed: {name}")
    if file is not None:
        write(file, devices, rows, seconds)
    return not failed


def write(file: Path, devices: list[Any], rows: list[Row], seconds: float) -> None:
    """Write the rows, the device and JAX's version as JSON."""
    result = {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "jax": jax.__version__,
        "seconds": seconds,
        "pass": all(row.passed for row in rows),
        "rows": [row.as_json() for row in rows],
    }
    try:
        write_atomically(file, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
