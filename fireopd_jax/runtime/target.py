"""The devices that programs are made for: those of this process, or others, of a plan.

    with made_for(devices of a topology): platform() -> "tpu"

Compiling ahead of time needs no device; what depends on the platform asks here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

_PLANNED: ContextVar[Sequence[Any]] = ContextVar("planned", default=())


@contextmanager
def made_for(devices: Sequence[Any]) -> Iterator[None]:
    """Make the programs of this block for other devices than those of this process."""
    token = _PLANNED.set(tuple(devices))
    try:
        yield
    finally:
        _PLANNED.reset(token)


def platform() -> str:
    """Return the platform that programs are made for: "cpu", "gpu" or "tpu"."""
    planned = _PLANNED.get()
    if not planned:
        return jax.default_backend()
    return "gpu" if planned[0].platform == "cuda" else planned[0].platform


def devices() -> Sequence[Any]:
    """Return the devices that programs are made for."""
    return _PLANNED.get() or jax.devices()
