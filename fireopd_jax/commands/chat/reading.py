"""Messages from a terminal or a pipe: a line each, or several by a backslash or three quotes.

lines -> Reader -> one message or /command after the other, EOFError at the end
"""

import contextlib
import sys
from collections.abc import Callable
from importlib import import_module

from fireopd_jax.config import UserError

PROMPT, MORE = ">>> ", "... "
LONGEST_LINE = 2**24
"""Bytes."""
QUOTES = '"""'
LineOf = Callable[[str], str]
"""Returns the next line without its newline, after a prompt; EOFError at the end."""


def terminal_line(prompt: str) -> str:
    """Return a line that is typed, with line editing and the history of this process."""
    return input(prompt)


def piped_line(prompt: str) -> str:
    """Return a line of standard input; raise UserError where it is not UTF-8."""
    line = sys.stdin.buffer.readline(LONGEST_LINE + 1)
    if not line:
        raise EOFError
    if len(line) > LONGEST_LINE:
        raise UserError(f"standard input: a line of over {LONGEST_LINE:,} bytes, no message")
    try:
        return line.decode().removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not valid UTF-8: {error}") from error


def with_editing() -> LineOf:
    """Return `terminal_line`, with line editing where Python has `readline`."""
    with contextlib.suppress(ImportError):
        import_module("readline")  # `input` uses it from then on.
    return terminal_line


def message(line_of: LineOf) -> str:
    '''Return the next message or command.

    A line that ends with a backslash goes on in the next one, and so does a text between """ and
    """. At the end of the input an unfinished message is what is there.
    '''
    line = line_of(PROMPT)
    try:
        if line.lstrip().startswith(QUOTES):
            text = line.lstrip().removeprefix(QUOTES)
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + line_of(MORE)
            return text.rstrip().removesuffix(QUOTES).strip("\n")
        text = line
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            text += line_of(MORE)
        return text
    except EOFError:
        return text.strip("\n")
