"""Bounds for what a stranger has written: YAML, JSON and code that loops.

This module does not import JAX.
"""

import contextlib
import ctypes
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fireopd_jax.runtime.yaml_core import compose, load

WATCHED_S = 0.02
"""Seconds between two looks at the memory of a stranger's code."""
LARGEST_YAML = 2**22
"""Characters of a configuration."""
MOST_NODES = 200_000
"""Values of a configuration, those of an alias counted wherever it stands."""
LARGEST_TEXT = 2**24
"""Bytes of a text that is read whole, such as a chat template."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""How a text of UTF-16 begins."""
LARGEST_JSON = 2**28
"""Bytes of a JSON file that describes a model."""


class TooLarge(yaml.YAMLError):
    """A text of YAML is larger or deeper than any configuration."""


class TooLong(Exception):
    """Code of a stranger did not end in its time."""


class TooMuch(TooLong):
    """Code of a stranger took more memory than it may."""


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


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; raises ValueError, also for one nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(file: Path) -> Any:
    """Return the value in a JSON file; raises OSError and ValueError, also for one without end."""
    if not file.is_file():
        raise ValueError("not a file")
    with file.open("rb") as stream:
        text = stream.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"expected at most {LARGEST_JSON:,} bytes")
    return parse_json(text.decode("utf-8"))


def read_text(file: Path, most: int = LARGEST_TEXT) -> str:
    """Return the text of a file; raises OSError and ValueError, also for one without end."""
    if not file.is_file():
        file.stat()  # an OSError says that nothing is there
        raise ValueError("not a file")
    with file.open("rb") as stream:
        text = stream.read(most + 1)
    if len(text) > most:
        raise ValueError(f"expected at most {most:,} bytes")
    return text.decode("utf-8")


@contextmanager
def at_most(seconds: float, size: float = math.inf) -> Iterator[None]:
    """Raise `TooLong` in this thread, inside the block, after so many seconds of Python code.

    Raises `TooMuch` once the process has grown by `size` bytes.
    """
    thread, lock, over = threading.get_ident(), threading.Lock(), threading.Event()
    until, before = time.monotonic() + seconds, _resident()

    def end(error: type[Exception]) -> None:
        with lock:
            if not over.is_set():
                _raise_in(thread, error)

    def watch() -> None:
        step = seconds if math.isinf(size) else WATCHED_S
        while not over.wait(min(step, max(until - time.monotonic(), 0.0))):
            if _resident() - before > size:
                return end(TooMuch)
            if time.monotonic() >= until:
                return end(TooLong)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(TooLong), lock:
            over.set()


def _resident() -> int:
    """Return the memory of this process in bytes; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _raise_in(thread: int, error: type[Exception]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
