"""Warnings of the package as lines of a command."""

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@functools.cache
def warn_once(text: str) -> None:
    """Warn in the first call with this text; a report that fails each step is one line."""
    log.warning(text)


class _Stderr(logging.Handler):
    """Prints records to what stderr is at the time: a live line replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print the package's warnings as lines of the command."""
    package, handler = logging.getLogger("fireopd_jax"), _Stderr()
    handler.setFormatter(logging.Formatter("fireopd: %(message)s"))
    package.addHandler(handler)
    package.propagate = False  # a library's handler of all records would print them again
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.propagate = True
