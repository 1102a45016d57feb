"""Warnings of the package as lines of a command."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print the package's warnings as lines of the command."""
    package, handler = logging.getLogger("fireopd_jax"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fireopd: %(message)s"))
    package.addHandler(handler)
    package.propagate = False  # a library's handler of all records would print them again
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.propagate = True
