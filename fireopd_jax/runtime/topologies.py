"""Devices that are not here: TPU slices and GPUs, for which programs are compiled ahead of time.

    "v5p:4x4x4", "v6e:8", "h200:8", "cpu:8" -> Topology (devices, memory and speed of one)

TPU programs are compiled by libtpu, CUDA programs by its plugin; both are in the extra `aot`.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fireopd_jax.config import UserError, nearest
from fireopd_jax.runtime.memory import GIB, device_memory

TARGETS = Path(__file__).parent / "targets"
EXTRA = 'pip install "fireopd-jax[aot]"'
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody holds a device
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
}
MOST = 4096
"""Devices of a topology."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as its maker describes it."""

    platform: str
    gib: float | int
    """Memory that programs may use."""
    flops: float
    """Dense bfloat16 products per second."""
    bandwidth: float
    """Bytes of its memory per second."""
    axes: int = 1
    """Axes of the network that connects them."""


CHIPS = {
    # docs.cloud.google.com/tpu/docs: system architecture of each version
    "v4": Chip("tpu", 32, 275e12, 1228e9, axes=3),
    "v5e": Chip("tpu", 16, 197e12, 819e9, axes=2),
    "v5p": Chip("tpu", 95, 459e12, 2765e9, axes=3),
    "v6e": Chip("tpu", 32, 918e12, 1640e9, axes=2),
    # NVIDIA's data sheets: SXM, without sparsity; the memory that CUDA leaves
    "a100": Chip("gpu", 79, 312e12, 2039e9),
    "h100": Chip("gpu", 79, 989e12, 3350e9),
    "h200": Chip("gpu", 140, 989e12, 4800e9),
}
KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU v4": "v4", "NVIDIA A100": "a100",
         "NVIDIA H100": "h100", "NVIDIA H200": "h200"}  # fmt: skip
"""`device_kind` of JAX, or its beginning -> name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind."""

    name: str
    """Such as "v5p:4x4x4"."""
    devices: Sequence[Any]
    bytes: int
    """Memory of one device."""
    chip: Chip | None
    """None where its speed is not known, as that of a CPU."""


def find_topology(name: str | None) -> Topology:
    """Return the devices that a topology names, by default those of this process.

    Call it before any other use of JAX. Raises UserError for a name that is none, and where the
    compiler for these devices is not installed.
    """
    if name is None:
        return _here()
    kind, _, size = name.partition(":")
    if kind != "cpu" and kind not in CHIPS:
        known = ", ".join((*CHIPS, "cpu"))
        raise UserError(
            f"--topology {name}: expected KIND:COUNT or KIND:AxBxC, such as v5p:4x4x4, v6e:8 or "
            f"cpu:8; kinds are {known}{nearest(kind, (*CHIPS, 'cpu'))}"
        )
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", size):
        raise UserError(f"--topology {name}: expected {kind}:COUNT, such as {kind}:8")
    shape = [int(part) for part in size.split("x")]
    if math.prod(shape) > MOST:
        raise UserError(f"--topology {name}: {math.prod(shape):,} devices; at most {MOST:,}")
    if kind == "cpu":
        return _virtual_cpus(name, math.prod(shape))
    chip = CHIPS[kind]
    found = _tpus(name, kind, shape) if chip.platform == "tpu" else _gpus(name, kind, shape)
    return Topology(name, found, int(chip.gib * GIB), chip)


def chip_of(kind: str) -> Chip | None:
    """Return the chip of a `device_kind` of JAX; None where it is not known."""
    return next((CHIPS[name] for start, name in KINDS.items() if kind.startswith(start)), None)


def _here() -> Topology:
    devices = jax.devices()
    kind = devices[0].device_kind
    memory = device_memory(devices).total
    return Topology(f"{kind}:{len(devices)}", devices, memory, chip_of(kind))


def _virtual_cpus(name: str, count: int) -> Topology:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    return Topology(name, devices, device_memory(devices).total, None)


def slice_of(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the smallest slice of TPUs with so many chips: 8 -> 2 x 4 or 2 x 2 x 2.

    A shape with all its axes stays as it is; slices have at least 2 chips along two axes.
    """
    axes = CHIPS[kind].axes
    if len(shape) == axes:
        return tuple(shape)
    found, left = [2, 2] + [1] * (axes - 2), math.prod(shape)
    while math.prod(found) < left:
        found[found.index(min(found))] *= 2
    return tuple(found) if 1 in found else tuple(sorted(found))


def _tpus(name: str, kind: str, shape: Sequence[int]) -> Sequence[Any]:
    from jax.experimental import topologies

    count, axes = math.prod(shape), CHIPS[kind].axes
    if len(shape) not in (1, axes):
        raise UserError(f"--topology {name}: {kind} has {axes} axes, such as {kind}:{_like(axes)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {name}: compiling for TPUs needs libtpu: {EXTRA}")
    os.environ.update(WITHOUT_TPU)
    jax.config.update("jax_platforms", "cpu")  # no search for a TPU
    size = "x".join(map(str, slice_of(kind, shape)))
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{size}")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology {name}: libtpu has no such slice ({reason})") from error
    return found.devices[:count]


def _like(axes: int) -> str:
    return "x".join(["4"] * axes)


def _gpus(name: str, kind: str, shape: Sequence[int]) -> Sequence[Any]:
    from jax.experimental import topologies

    plugin = "jax_plugins.xla_cuda13"
    found = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(plugin)
    if not found:
        raise UserError(
            f"--topology {name}: compiling for CUDA needs its plugin, on Python 3.12 or newer: "
            f"{EXTRA}"
        )
    jax.config.update("jax_platforms", "cpu")  # no search for a GPU
    target = TARGETS / f"{kind}.textproto"
    count = math.prod(shape)
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=target.read_text(encoding="utf-8"),
        topology=f"1x1x{count}",
    )
    return described.devices[:count]
