"""The devices of this machine and its memory, in words and in numbers.

jax.devices() -> "1 × NVIDIA H200 (139 GiB)", "1 × cpu (2 cores, 24 GiB)"
"""

import importlib.metadata
import os
import shutil
import subprocess
from collections import Counter
from typing import Any

import jax

from fireopd_jax.runtime.memory import GIB, machine_memory

GPU_EXTRA = 'pip install "fireopd-jax[cuda]"'


def first_line() -> str:
    """Return versions and devices: the first line of a run's log."""
    own, of_jax = (importlib.metadata.version(name) for name in ("fireopd-jax", "jax"))
    return ", ".join([f"fireopd {own}, jax {of_jax}", *kinds()])


def kinds() -> list[str]:
    """Return number, kind and memory of the devices, one text per kind."""
    memory = total_memory()
    counted = Counter(device.device_kind for device in jax.devices())
    return [f"{count} × {kind} ({_size(kind, memory)})" for kind, count in counted.items()]


def _size(kind: str, memory: dict[str, int | None]) -> str:
    cores = f"{usable_cores()} cores, " if kind == "cpu" else ""
    size = memory.get(kind)
    return cores + ("unknown memory" if size is None else f"{size / GIB:.0f} GiB")


def total_memory() -> dict[str, int | None]:
    """Return the memory of one device of each kind in bytes; None where it is not known.

    A CPU has that of the machine, or of its container.
    """
    return {device.device_kind: _memory(device) for device in jax.devices()}


def _memory(device: Any) -> int | None:
    if device.platform == "cpu":
        return machine_memory().total
    # JAX knows only the part that it may use.
    if device.platform == "gpu" and (found := installed_gpus()):
        return found.get(device.device_kind, next(iter(found.values())))
    return (device.memory_stats() or {}).get("bytes_limit")


def installed_gpus() -> dict[str, int]:
    """Return name and memory in bytes of the NVIDIA GPUs, by nvidia-smi; {} without it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return {}
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        pairs = (line.rsplit(",", 1) for line in found.stdout.splitlines() if "," in line)
        return {name.strip(): int(mebibytes) * 1024**2 for name, mebibytes in pairs}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def advice() -> list[str]:
    """Return lines on accelerators that are here and not used: empty where all is well."""
    if jax.default_backend() != "cpu":
        return []
    asked = os.environ.get("JAX_PLATFORMS")
    if gpus := installed_gpus():
        names = ", ".join(gpus)
        if asked == "cpu":
            return [f"an NVIDIA GPU is here ({names}), and JAX_PLATFORMS=cpu keeps JAX off it"]
        return [f"an NVIDIA GPU is here ({names}), but JAX runs on the CPU: {GPU_EXTRA}"]
    if asked != "cpu" and _has_cuda():
        return ["jax[cuda] is installed, but there is no GPU that JAX can use; it runs on the CPU"]
    return []


def _has_cuda() -> bool:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return any("cuda" in plugin.name for plugin in plugins)


def described() -> dict[str, Any]:
    """Return the devices and the memory for a bug report."""
    memory = total_memory()
    counted = Counter((device.platform, device.device_kind) for device in jax.devices())
    return {
        "described": kinds(),
        "kinds": [
            {"platform": platform, "kind": kind, "count": count, "memory_bytes": memory[kind]}
            for (platform, kind), count in counted.items()
        ],
        "advice": advice(),
        "usable_cores": usable_cores(),
        "usable_memory_bytes": machine_memory().total,
        "jax_platforms": os.environ.get("JAX_PLATFORMS"),
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }
