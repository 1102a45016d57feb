"""The answer to a signal, at once: called in a signal handler, where nothing may wait or print."""

import contextlib
import os
import signal
import sys

from fireopd_jax.terminal.record import keep
from fireopd_jax.terminal.screen import is_live

STDERR = 2
ERASED = "\r\x1b[2K"
"""Moves the cursor to the start of the live line, and erases it."""


def answer(number: int) -> None:
    """Announce that the run stops after this step: on stderr, past all buffers, and in the log."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    text = f"{name}: stopping after this step, then saving; Ctrl-C again to stop now"
    keep(text)
    erased = ERASED if is_live(sys.__stderr__) else ""
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(STDERR, f"{erased}{text}\n".encode())
