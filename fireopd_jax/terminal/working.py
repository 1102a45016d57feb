"""What takes long and cannot be counted, said as it begins: loading, compiling, saving.

with working("compiling the update"):  ...

On a terminal it is the live line, with the seconds so far. Elsewhere it is a line at the beginning,
one every half minute while it lasts, and one at the end if it was long. This module does not import
JAX.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from fireopd_jax.terminal.meter import fitted, span
from fireopd_jax.terminal.progress import plain_line
from fireopd_jax.terminal.safe import one_line
from fireopd_jax.terminal.screen import Screen, is_live, screen

AGAIN_S = 30.0
LONG_S = 2.0
SPINNERS = {True: "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", False: "|/-\\"}


@contextmanager
def working(
    text: str,
    *,
    after: float = 0.0,
    interactive: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
    on: Screen | None = None,
) -> Iterator[None]:
    """Show that `text` goes on inside the block, such as "loading SmolLM2-135M".

    `after` are the seconds before it is said in plain lines: for what is quick as a rule. `on` is
    the screen, by default stderr.
    """
    live = is_live(sys.stderr) if interactive is None else interactive
    work = _Work(one_line(text), after, clock, None if not live else on or screen())
    with work.screen.showing(work) if work.screen else nullcontext(), work:
        yield


class _Work:
    """Work on the live line and in plain lines, of which a thread says those that are due."""

    def __init__(self, text: str, after: float, clock: Callable[[], float], screen: Screen | None):
        self.text, self.screen, self._clock = text, screen, clock
        self.began = clock()
        self.due = self.began + after
        self._said = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="working", daemon=True)

    def seconds(self) -> float:
        return self._clock() - self.began

    def say_if_due(self) -> None:
        """Print the line of this moment: the first, or how long it has been so far."""
        if self._clock() < self.due:
            return
        self._plain(f"{self.text}, {span(self.seconds())} so far" if self._said else self.text)
        self._said, self.due = True, self._clock() + AGAIN_S

    def _watch(self) -> None:
        while not self._ended.wait(max(self.due - self._clock(), 0.05)):
            self.say_if_due()

    def _plain(self, text: str) -> None:
        plain_line(text, self.screen is None)

    def line(self, width: int, unicode: bool) -> str:
        spinner = SPINNERS[unicode]
        turn = spinner[int(self.seconds() * 4) % len(spinner)]
        seconds = span(self.seconds())
        return f"{turn} {fitted(self.text, max(width - len(seconds) - 4, 0))}  {seconds}"

    def short(self) -> str:
        return self.text

    def __enter__(self) -> None:
        self.say_if_due()
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._said and kind is None and self.seconds() >= LONG_S:
            self._plain(f"{self.text}: done in {self.seconds():.1f} s")
