"""What tests of sandboxes share: the layers of isolation, and a look for what programs leave."""

import dataclasses
import functools
import time
import uuid
from pathlib import Path

import pytest

from fireopd_jax.evaluation import launching
from fireopd_jax.evaluation.sandbox import Limits, Refused, Sandbox

LIMITS = Limits(
    time_s=0.5,
    clock_s=10.0,  # A busy machine is no fault of a program.
    memory_bytes=400 << 20,
    disk_bytes=4 << 20,
    output_bytes=1 << 16,
)
QUICK = dataclasses.replace(LIMITS, clock_s=0.7)
"""For programs that do not end."""
LAYERS = {
    "namespaces": {"isolation": "namespaces"},
    "filters": {"isolation": "filters"},
    "namespaces alone": {"isolation": "namespaces", "seccomp": False},
}

EVERY_LAYER = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "namespaces alone" else [])
    for name in LAYERS
]
"""Namespaces stand alone only on processors whose system calls have no numbers here."""


@functools.cache
def refusal(layer: str) -> str:
    """Return why the system does not offer a layer; empty if it does."""
    try:
        Sandbox("", LIMITS, **LAYERS[layer]).close()
    except Refused as refused:
        return str(refused)
    return ""


def mark_launchers(monkeypatch) -> str:
    """Start the launchers from now on with a mark that all of their forks bear."""
    mark = f"mark={uuid.uuid4().hex}"
    launching.launchers.close()
    monkeypatch.setattr(launching, "OPTIONS", ("-X", mark, *launching.OPTIONS))
    return mark


def processes(mark: str) -> list[int]:
    """Return the processes that bear a mark, in whatever session or namespace they are."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # It ended.
    return found


def nothing_remains(mark: str, seconds: float = 10.0) -> bool:
    """Return whether all processes with a mark end."""
    deadline = time.monotonic() + seconds
    while left := processes(mark):
        if time.monotonic() > deadline:
            print(f"left: {left}")
            return False
        time.sleep(0.01)
    return True
