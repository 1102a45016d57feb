"""Bounds for what a stranger has written: YAML, JSON and code that loops.

This module does not import JAX.
"""

import contextlib
import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fireopd_jax.runtime.yaml_core import compose, load

LARGEST_YAML = 2**22
"""Characters of a configuration."""
MOST_NODES = 200_000
"""Values of a configuration, those of an alias counted wherever it stands."""
LARGEST_JSON = 2**28
"""Bytes of a JSON file that describes a model."""


class TooLarge(yaml.YAMLError):
    """A text of YAML is larger or deeper than any configuration."""


class TooLong(Exception):
    """Code of a stranger did not end in its time."""


def read_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return node and value of a YAML text.

    Raises yaml.YAMLError, also for a text that is too large, too deep, or multiplies by aliases.
    """
    if len(text) > LARGEST_YAML:
        raise TooLarge(f"{len(text):,} characters; expected at most {LARGEST_YAML:,}")
    try:
        node = compose(text)
        _count(node)
        return node, load(text)
    except RecursionError:
        raise TooLarge("nested too deeply, or within itself") from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError) as error:
        # PyYAML's own conversions, such as of a number with 5000 digits.
        raise yaml.YAMLError(" ".join(str(error).split())) from None


def _count(root: yaml.Node | None) -> None:
    """Raise YAMLError for too many values; an alias is the same node again."""
    known: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in known:
            found = 1
            if isinstance(node, yaml.MappingNode):
                found += sum(size(key) + size(value) for key, value in node.value)
            elif isinstance(node, yaml.SequenceNode):
                found += sum(map(size, node.value))
            known[id(node)] = found
            if found > MOST_NODES:
                raise TooLarge(f"over {MOST_NODES:,} values; its aliases multiply")
        return known[id(node)]

    if root is not None:
        size(root)


def read_json(file: Path) -> Any:
    """Return the value in a JSON file; raises OSError and ValueError, also for one without end."""
    if not file.is_file():
        raise ValueError("not a file")
    with file.open("rb") as stream:
        text = stream.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"expected at most {LARGEST_JSON:,} bytes")
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in this thread, inside the block, after so many seconds of Python code."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def end() -> None:
        with lock:
            if not over:
                _raise_in(thread, TooLong)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with contextlib.suppress(TooLong), lock:
            over = True


def _raise_in(thread: int, error: type[Exception]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
