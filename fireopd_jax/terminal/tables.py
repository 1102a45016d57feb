"""Tables on stdout."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fireopd_jax.runtime.files import plain

# Without a terminal rich assumes 80 columns and wraps cells; a file needs no such limit.
FILE_WIDTH = 140


def cell(value: object) -> str:
    """Return a value as text: numbers with four digits, None as a dash."""
    value = plain(value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(
    rows: Sequence[Sequence[object]], columns: Sequence[str], *, title: str | None = None
) -> None:
    """Print a table to stdout; columns of numbers are right-aligned."""
    printed = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        numbers = all(isinstance(plain(row[index]), int | float | None) for row in rows)
        printed.add_column(name, justify="right" if rows and numbers else "left")
    for row in rows:
        # Not as rich markup: a cell such as "[a]" is text.
        printed.add_row(*(cell(value).replace("[", r"\[") for value in row))
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(printed)
