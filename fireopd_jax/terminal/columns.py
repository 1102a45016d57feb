"""Texts that grow, side by side.

    texts so far -> wrapped -> rows that will not change any more, and those that still may

A text only grows at its end, so that of its wrapped lines only the last may change.
"""

import dataclasses
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

BAR = " │ "
CROSS = "─┼─"
TAB = 4
CONTROL = {code: 0xFFFD for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Return a text without control characters, which could move the cursor of a terminal."""
    return text.translate(CONTROL)


def wrapped(text: str, width: int) -> list[str]:
    """Return a text as lines of at most `width` cells, broken between words where it can be."""
    console = Console(width=width, color_system=None)
    lines: list[str] = []
    for paragraph in visible(text).expandtabs(TAB).split("\n"):
        if cell_len(paragraph) <= width:
            lines.append(paragraph.rstrip())
        else:
            pieces = Text(paragraph).wrap(console, width)
            lines += [piece.plain.rstrip() for piece in pieces]
    return lines


@dataclasses.dataclass
class Columns:
    """Rows of texts that stand side by side in `width` cells."""

    count: int
    width: int
    done: int = 0
    """Rows that have been taken by `settled`."""

    @property
    def column(self) -> int:
        """Width of one column."""
        return (self.width - len(BAR) * (self.count - 1)) // self.count

    def row(self, cells: Sequence[str]) -> str:
        """Return one line of each text as a row."""
        padded = [set_cell_size(each, self.column) for each in cells]
        return BAR.join(padded).rstrip()

    def rule(self) -> str:
        """Return a line below the names."""
        return CROSS.join(["─" * self.column] * self.count)

    def rows(self, texts: Sequence[str]) -> list[str]:
        """Return whole texts as rows; the shorter ones end with empty cells."""
        lines = [wrapped(text, self.column) for text in texts]
        height = max(map(len, lines))
        return [self.row([own[i] if i < len(own) else "" for own in lines]) for i in range(height)]

    def settled(self, texts: Sequence[str], ended: Sequence[bool]) -> tuple[list[str], list[str]]:
        """Return the new rows that no text will change any more, and the rows below them."""
        rows = self.rows(texts)
        final = [
            len(rows) if over else len(wrapped(text, self.column)) - 1
            for text, over in zip(texts, ended, strict=True)
        ]
        start, self.done = self.done, max(self.done, min(final))
        return rows[start : self.done], rows[self.done :]
