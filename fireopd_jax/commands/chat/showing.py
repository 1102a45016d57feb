"""Answers as they are drawn: one, two in columns, or one below the other.

On a terminal, notes are dim lines between the answers. Elsewhere standard output has the answers
alone, without control codes, and notes go to standard error.
"""

import contextlib
import shutil
import sys
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fireopd_jax.commands.journal import say
from fireopd_jax.session.chatting import Answer
from fireopd_jax.terminal.columns import Columns, visible, wrapped

NARROW = 60
"""Below this width two answers stand one below the other."""


@runtime_checkable
class View(Protocol):
    """Shows the answers to one message."""

    together: bool
    """Whether the answers are drawn in turn; else one after the other."""

    def __enter__(self) -> object:
        """Begin."""
        ...

    def __exit__(self, *error: object) -> object:
        """End."""
        ...

    def update(self, side: int, answer: Answer) -> None:
        """Show the answer of a side so far."""
        ...

    def end(self, summaries: Sequence[str]) -> None:
        """Show what remains, and a line about each answer."""
        ...


class Screen:
    """Where a chat is shown: a terminal, or standard output and error."""

    def __init__(self, interactive: bool, console: Console | None = None):
        """Show dim notes on the console if `interactive`."""
        self.interactive = interactive
        self.console = console or Console(file=sys.stdout, highlight=False, markup=False)
        self.width = (
            self.console.width if interactive else shutil.get_terminal_size((80, 24)).columns
        )

    def note(self, text: str) -> None:
        """Show a line that no model has written."""
        if self.interactive:
            self.console.print(Text(text, style="dim"), soft_wrap=True)
        else:
            say(text)

    def write(self, text: str) -> None:
        """Write a piece of an answer."""
        self.console.file.write(visible(text))
        self.console.file.flush()

    def view(self, titles: Sequence[str]) -> View:
        """Return the view of the answers to one message."""
        if len(titles) == 1:
            return Below(self, None)
        if self.width < NARROW:
            return Below(self, titles)
        live = self.interactive and self.console.is_terminal and not self.console.is_dumb_terminal
        return Beside(self, titles, live)


class Below(contextlib.AbstractContextManager[object]):
    """Answers one below the other, each as it is drawn; with names where there are several."""

    together = False

    def __init__(self, screen: Screen, titles: Sequence[str] | None):
        self.screen, self.titles = screen, titles
        self._side, self._text = -1, ""

    def __exit__(self, *error: object) -> None:
        """Nothing remains to be restored."""

    def update(self, side: int, answer: Answer) -> None:
        """Write what is new."""
        if side != self._side:
            self._begin(side)
        self.screen.write(answer.text[len(self._text) :])
        self._text = answer.text

    def _begin(self, side: int) -> None:
        if self._side >= 0:
            self.screen.write("\n\n")
        self._side, self._text = side, ""
        if self.titles is not None:
            self.screen.write(f"[{self.titles[side]}]\n")

    def end(self, summaries: Sequence[str]) -> None:
        """End the line, and note what each answer took."""
        self.screen.write("\n")
        for side, text in enumerate(summaries):
            whose = "" if self.titles is None else f"{self.titles[side]}: "
            self.screen.note(whose + text)


class Beside(contextlib.AbstractContextManager[object]):
    """Two answers in columns; on a terminal as they are drawn."""

    together = True

    def __init__(self, screen: Screen, titles: Sequence[str], live: bool):
        self.screen, self.titles = screen, titles
        self._columns = Columns(len(titles), screen.width)
        self._texts, self._ended = [""] * len(titles), [False] * len(titles)
        self._live = (
            Live(console=screen.console, auto_refresh=False, transient=True) if live else None
        )

    def __enter__(self) -> object:
        """Write the names."""
        names = [wrapped(title, self._columns.column) for title in self.titles]
        for row in self._columns.rows(["\n".join(own) for own in names]):
            self._line(row)
        self._line(self._columns.rule())
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def update(self, side: int, answer: Answer) -> None:
        """Write the rows that are final, and on a terminal the rows below them for now."""
        self._texts[side], self._ended[side] = answer.text, answer.finish != "running"
        if self._live is None:
            return
        final, others = self._columns.settled(self._texts, self._ended)
        for row in final:
            self._line(row)
        height = max(1, self.screen.console.height - 2)
        rows = Text("\n".join(others[-height:]), no_wrap=True)
        self._live.update(rows, refresh=True)

    def end(self, summaries: Sequence[str]) -> None:
        """Write the last rows, and what each answer took below it."""
        final, _ = self._columns.settled(self._texts, [True] * len(self._texts))
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()
        for row in final:
            self._line(row)
        for row in self._columns.rows(list(summaries)):
            self._line(row, dim=True)

    def _line(self, row: str, dim: bool = False) -> None:
        if self.screen.interactive:
            style = "dim" if dim else ""
            self.screen.console.print(Text(row, style=style, no_wrap=True), crop=False)
        else:
            self.screen.write(row + "\n")


def summary(answer: Answer | None, max_tokens: int) -> str:
    """Return the line about an answer: its tokens, their rate, the first one's time, its end."""
    if answer is None:
        return "0 tokens · stopped"
    tokens = f"{answer.tokens:,} token" + ("s" if answer.tokens != 1 else "")
    rate = f"{answer.rate:.1f} tokens/s" if answer.tokens > 1 else ""
    parts = [tokens, rate, f"first after {answer.first_s:.2f} s", _ending(answer, max_tokens)]
    return " · ".join(part for part in parts if part)


def _ending(answer: Answer, max_tokens: int) -> str:
    if answer.finish == "length":
        if answer.tokens >= max_tokens:
            return f"cut at --max-tokens {max_tokens}"
        return "cut: the context is full"
    if answer.finish == "not_finite":
        return "ended: logits that are not finite"
    return "stopped" if answer.finish == "running" else ""
