"""The live line at the bottom of a terminal, and whether there is a terminal for it.

progress, working ... -> a stack of activities -> one line, redrawn four times a second

It is always one line, narrower than the terminal: so nothing wraps, and a line that a signal
handler writes replaces it, until it is redrawn below.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

UNSET = ("", "0", "false", "no")


@runtime_checkable
class Activity(Protocol):
    """Something that goes on."""

    def line(self, width: int, unicode: bool) -> str:
        """Return a line of at most `width` columns."""
        ...

    def short(self) -> str:
        """Return what stands before the line of an activity inside this one."""
        ...


def is_live(stream: Any) -> bool:
    """Return whether a line may be redrawn on a stream: a terminal that is not dumb, and no CI.

    `stream` is None where Python has no such stream.
    """
    try:
        terminal = stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
    in_ci = os.environ.get("CI", "").lower() not in UNSET
    return terminal and os.environ.get("TERM") not in ("dumb", "unknown") and not in_ci


class Screen:
    """The activities that go on, the newest last; the newest has the line."""

    def __init__(self, console: Console):
        self.console = console
        self._stack: list[Activity] = []
        self._live: Live | None = None

    @contextmanager
    def showing(self, activity: Activity) -> Iterator[None]:
        """Show an activity inside the block."""
        self._stack.append(activity)
        if self._live is None:
            # Rich would redirect stdout to stderr, which is right for a terminal only.
            self._live = Live(
                self, console=self.console, transient=True, redirect_stdout=sys.stdout.isatty()
            )
            self._live.start(refresh=True)
        try:
            yield
        finally:
            self._stack.remove(activity)
            if not self._stack:
                live, self._live = self._live, None
                live.stop()

    def refresh(self) -> None:
        """Redraw the line at once."""
        if self._live is not None:
            self._live.refresh()

    def leave(self, activity: Activity) -> None:
        """Print the line of an activity for good, above the live one."""
        line = activity.line(max(self.console.width - 1, 1), self._unicode)
        self.console.print(styled(line), end="\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw the line; the last column stays free, so that no terminal breaks it."""
        yield styled(self._line(max(options.max_width - 1, 1)))

    @property
    def _unicode(self) -> bool:
        return self.console.encoding.startswith("utf")

    def _line(self, width: int) -> str:
        """Return what the line shows now."""
        if not self._stack:
            return ""
        below = f"{self._stack[-2].short()}  " if len(self._stack) > 1 else ""
        if cell_len(below) > width // 2:
            below = ""
        return below + self._stack[-1].line(width - cell_len(below), self._unicode)


def styled(line: str) -> Text:
    """Return a line with its counts and the time that is left in colour."""
    text = Text(line, no_wrap=True, overflow="crop", end="")
    text.highlight_regex(r"\d+/\d+", "bold")
    text.highlight_regex(r"eta \S+", "cyan")
    return text


_screens: list[Screen] = []


def screen() -> Screen:
    """Return the screen on stderr, which all activities of the process share."""
    if not _screens:
        _screens.append(Screen(Console(stderr=True, force_terminal=True)))
    return _screens[0]
