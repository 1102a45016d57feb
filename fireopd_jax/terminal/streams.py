"""Standard streams on which printing never fails.

    sys.stdout, sys.stderr -> guarded_streams(product) -> the same, whose writes raise no error

A reader, a terminal or a disk may go away while a run prints, and a stream may be closed, or of an
encoding without our characters. None of it may cost a step. Where the standard output is what a
command is for, its loss ends the command: quietly where the reader is gone, as an error otherwise.

This module does not import JAX.
"""

import errno
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

READER_GONE = 128 + 13
"""Exit code of a command whose output nobody reads any more: that of a death by SIGPIPE."""
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESHUTDOWN, errno.ECONNRESET)
"""Errors after which nothing will be read from a stream: its pipe, terminal or socket is closed."""


class OutputLost(Exception):
    """The standard output of a command could not be written, for another reason than its reader."""


class Guarded(io.TextIOBase):
    """A text stream whose writes do not raise; characters outside its encoding become `?`.

    `product`: the loss of the stream ends the command, by SystemExit or `OutputLost`. `absent`:
    the stream was closed before the command began.
    """

    def __init__(self, stream: Any, product: bool = False, absent: bool = False):
        self.stream, self.product, self.absent = stream, product, absent
        self.gone = False
        """Whether the reader is gone; then everything that is written is dropped."""
        if isinstance(stream, io.TextIOWrapper):
            try:
                stream.reconfigure(errors="replace")
            except (OSError, ValueError) as error:
                self._lost(error)

    def write(self, text: str, /) -> int:
        """Write a text as far as the stream takes it; return its length."""
        if self.absent and self.product and text:
            self.product = False
            raise OutputLost("standard output: it is closed")
        if not self.gone:
            try:
                self.stream.write(text)
            except (OSError, ValueError) as error:
                self._lost(error)
        return len(text)

    def writelines(self, lines: Iterable[str], /) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on what is buffered, as far as the stream takes it."""
        if not self.gone:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        closed = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
        if closed or getattr(error, "errno", None) in GONE:
            self.gone = True
            _to_nowhere(self.stream)
            if self.product and not closed:
                raise SystemExit(READER_GONE)
        elif self.product:
            self.product = False  # once: the last flush would raise it again
            _to_nowhere(self.stream)
            raise OutputLost(f"standard output: {getattr(error, 'strerror', None) or error}")

    def close(self) -> None:
        """Flush; the streams of a process stay open until its end."""
        self.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that is still there."""
        try:
            return not self.gone and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self.stream.fileno()

    def readable(self) -> bool:
        """Return False."""
        return False

    def writable(self) -> bool:
        """Return True, also of a stream whose reader is gone."""
        return True

    @property
    def buffer(self) -> Any:
        """The stream of bytes below."""
        return self.stream.buffer

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stream's encoding."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How characters outside the encoding are written."""
        return getattr(self.stream, "errors", None)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.stream, name)


@contextmanager
def guarded_streams(product: bool = False) -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr`, inside the block, by streams that do not raise.

    `product`: the standard output is what the command is for. Closed descriptors are opened on
    /dev/null, so that no file of the command gets the number of one of them.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        _open_if_closed(number, mode)
    if sys.stdin is None:  # closed before Python began: it is at its end
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for name, number, stream in zip(("stdout", "stderr"), (1, 2), before, strict=True):
            _wait_for_reader(number)
            absent = stream is None  # closed before Python began
            guarded = Guarded(nowhere if absent else stream, product and number == 1, absent)
            setattr(sys, name, guarded)
        own = sys.stdout, sys.stderr
        try:
            yield
        finally:
            for stream in own:
                _drop(stream)
            sys.stdout, sys.stderr = before


def flush_streams() -> None:
    """Flush both streams; of a product, raise what `Guarded` raises."""
    for stream in (sys.stderr, sys.stdout):
        stream.flush()


def _drop(guarded: Any) -> None:
    """Send what is left in a buffer nowhere if it cannot be written: Python flushes once more."""
    guarded.product = False
    guarded.flush()
    try:
        guarded.stream.flush()
    except (OSError, ValueError):
        _to_nowhere(guarded.stream)


def _open_if_closed(number: int, mode: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, mode)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _wait_for_reader(number: int) -> None:
    """Make writes wait for a slow reader: another process may have made the pipe non-blocking."""
    try:
        os.set_blocking(number, True)
    except OSError:
        return


def _to_nowhere(stream: Any) -> None:
    """Point the descriptor of a stream to /dev/null: what its buffer holds must go somewhere."""
    try:
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):
        return
    os.dup2(nowhere, number)
    os.close(nowhere)
