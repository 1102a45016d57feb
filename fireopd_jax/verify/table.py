"""Rows of the verification: name, error and bound of each comparison.

arrays of the package, arrays of the reference -> Row -> table, JSON
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: its error, and the largest error that passes."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; False if it is NaN."""
        return self.error <= self.bound

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON values; an error that is not finite becomes null."""
        error = self.error if np.isfinite(self.error) else None
        return {"name": self.name, "error": error, "bound": self.bound, "pass": self.passed}


def relative(name: str, pairs: Iterable[tuple[Any, Any]], bound: float) -> Row:
    """Return the worst relative error: largest difference over the exact array's largest value.

    If an exact array is all zeros, its largest difference counts unscaled.
    """
    worst = 0.0
    for ours, exact in pairs:
        gap, exact = _gap(ours, exact)
        size = np.abs(exact).max(initial=0.0)
        worst = max(worst, gap / size if size else gap) if gap == gap else float("nan")
        if worst != worst:
            break
    return Row(name, float(worst), bound)


def absolute(name: str, pairs: Iterable[tuple[Any, Any]], bound: float) -> Row:
    """Return the largest absolute difference."""
    gaps = [_gap(ours, exact)[0] for ours, exact in pairs]
    return Row(name, float(np.max(gaps, initial=0.0)), bound)


def differing(name: str, ours: Any, exact: Any) -> Row:
    """Return the number of elements that differ, for ids and decisions; the bound is 0."""
    ours, exact = np.asarray(ours), np.asarray(exact)
    return Row(name, float(ours.shape != exact.shape or np.sum(ours != exact)), 0.0)


def _gap(ours: Any, exact: Any) -> tuple[float, np.ndarray]:
    ours, exact = (np.asarray(x, np.float64) for x in (ours, exact))
    if ours.shape != exact.shape:
        return float("nan"), exact
    return float(np.abs(ours - exact).max(initial=0.0)), exact


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table; the last column is `NO` for a row that fails."""
    table = Table(title=title, title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("error", "bound", "pass"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        verdict = "yes" if row.passed else "NO"
        table.add_row(row.name, f"{row.error:.1e}", f"{row.bound:.1e}", verdict)
    # Without a terminal the default width would cut off long names.
    widest = max((len(row.name) for row in rows), default=0)
    Console(width=max(Console().width, widest + 40)).print(table)
