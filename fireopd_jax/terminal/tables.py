"""Tables on stdout, and in the log of a run."""

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fireopd_jax.runtime.files import plain
from fireopd_jax.terminal.meter import cell
from fireopd_jax.terminal.record import keep
from fireopd_jax.terminal.safe import one_line

# Without a terminal rich assumes 80 columns and wraps cells; a file needs no such limit.
FILE_WIDTH = 140


def table(
    rows: Sequence[Sequence[object]], columns: Sequence[str], *, title: str | None = None
) -> None:
    """Print a table to stdout; columns of numbers are right-aligned."""
    printed = Table(title=None if title is None else Text(one_line(title)), title_justify="left")
    for index, name in enumerate(columns):
        numbers = all(isinstance(plain(row[index]), int | float | None) for row in rows)
        printed.add_column(Text(name), justify="right" if rows and numbers else "left")
    for row in rows:
        # Not as rich markup: a cell such as "[a]" is text.
        printed.add_row(*(Text(one_line(cell(value))) for value in row))
    in_file = io.StringIO()
    Console(file=in_file, width=FILE_WIDTH, force_terminal=False, color_system=None).print(printed)
    keep("\n".join(line.rstrip() for line in in_file.getvalue().splitlines()))
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(printed)
