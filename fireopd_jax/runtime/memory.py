"""Memory of the devices: what XLA may allocate, or what this machine has.

devices -> Memory (bytes on one device: free, and in total)
"""

import ctypes
import dataclasses
import functools
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from fireopd_jax.config import UserError

OVERRIDE = "FIREOPD_MEMORY_GIB"
GIB = 2**30
SYSTEM = Path("/")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes."""

    free: int
    """What is free now; on a GPU or TPU, all that XLA may allocate."""
    total: int
    """What could be free at best: more is never available."""


def device_memory(devices: Sequence[Any]) -> Memory:
    """Return the memory of one of the devices; CPU devices share that of the machine.

    `FIREOPD_MEMORY_GIB` (GiB of one device) replaces what is found. Raises UserError for a value
    that is no positive number.
    """
    if given := os.environ.get(OVERRIDE):
        try:
            size = float(given)
        except ValueError:
            size = 0.0
        if not 0 < size < float("inf"):
            raise UserError(f"{OVERRIDE}={given}: expected the GiB of one device, such as 24")
        return Memory(int(size * GIB), int(size * GIB))
    own = [each for each in devices if each.process_index == jax.process_index()]
    stats = own[0].memory_stats() if own[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return Memory(stats["bytes_limit"], stats["bytes_limit"])
    machine = machine_memory()
    return Memory(machine.free // len(own), machine.total // len(own))


def resident_bytes(key: str, process: str = "self") -> int:
    """Return a process's resident memory in bytes, now (VmRSS) or at its peak (VmHWM).

    Where the system does not tell: the peak of this process, or the largest of its ended children.
    """
    status = Path(f"/proc/{process}/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines[key].split()[0]) * 1024
    who = resource.RUSAGE_SELF if process == "self" else resource.RUSAGE_CHILDREN
    largest = resource.getrusage(who).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def release_freed() -> None:
    """Return freed memory of this process to the system, where the C library can (glibc).

    Otherwise a peak is kept for good: compilers free most of what they take, in small pieces.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library; Windows
        return None


def machine_memory(root: Path = SYSTEM) -> Memory:
    """Return the memory of this machine, or of the container that limits it (cgroup v1 or v2)."""
    free, total = _physical(root)
    for limit, used in _limits(root):
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return Memory(free, total)


def _physical(root: Path) -> tuple[int, int]:
    file = root / "proc/meminfo"
    if not file.is_file():  # no Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    kib = {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1}
    return kib.get("MemAvailable", kib["MemFree"]) * 1024, kib["MemTotal"] * 1024


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each memory cgroup of this process that has a limit."""
    groups = root / "proc/self/cgroup"
    named = groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []
    for line in named:
        _, kinds, name = line.split(":", 2)
        if kinds == "":
            top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Inside a container the group's path may be the host's, which is not mounted.
        inner = top / name.strip("/")
        for folder in dict.fromkeys((inner, *(p for p in inner.parents if p.is_relative_to(top)))):
            limit = _number(folder / files[0])
            if limit is not None:
                used = _number(folder / files[1]) or 0
                yield limit, max(used - _cached(folder / "memory.stat", files[2]), 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _cached(file: Path, name: str) -> int:
    """Return the bytes of files that the kernel drops when memory is needed."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if line[:1] == [name]), 0)
