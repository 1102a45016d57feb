"""A terminal of a few lines: what a person sees after the bytes that were written to it."""

import re

from rich.cells import cell_len

TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b(.)|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """Rows of text, a cursor, and how often a line ran over the right edge."""

    def __init__(self, width):
        self.width, self.rows, self.row, self.column, self.overruns = width, [""], 0, 0, 0
        self.cursor_shown = True

    def feed(self, written):
        for numbers, command, other, control, text in TOKEN.findall(written):
            assert not other, f"an escape that is not known here: {other!r}"
            if command:
                self._command(numbers, command)
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self.row, self.column = self.row + 1, 0
                while len(self.rows) <= self.row:
                    self.rows.append("")
            else:
                line = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = line[: self.column] + text + line[self.column + len(text) :]
                self.column += len(text)
                self.overruns += cell_len(self.rows[self.row]) > self.width
        return self

    def _command(self, numbers, command):
        if command == "K":
            assert numbers == "2"
            self.rows[self.row] = ""
        elif command == "A":
            self.row -= int(numbers or 1)
        elif command in "hl" and numbers == "?25":
            self.cursor_shown = command == "h"
        else:
            assert command == "m", f"a command that is not known here: {command}"

    def text(self):
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n")


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now
