"""`fireopd report`."""

from collections.abc import Sequence
from pathlib import Path

from fireopd_jax.report.page import write_report
from fireopd_jax.terminal.working import LONG_S, working


def report(runs: Sequence[str], out: Path | None) -> Path:
    """Write the page of some runs; return its path."""
    with working(f"reading {', '.join(runs)}", after=LONG_S):
        return write_report(runs, out)
