"""Compile for an H200 ahead of time, without any GPU or driver.

This needs only the CUDA plugin and compiler, and a text description of the GPU. Compiled programs
are not run.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.runtime.topologies import TARGETS

TARGET = TARGETS / "h200.textproto"
MODULES = {
    "jax_plugins.xla_cuda13": "jax-cuda13-plugin and jax-cuda13-pjrt",
    "nvidia.cu13.bin": "nvidia-cuda-nvcc and nvidia-nvvm",
}


def missing() -> str | None:
    """Return what is missing for ahead-of-time compilation, None if nothing is."""
    if jax.__version_info__ < (0, 11):
        return f"Mosaic GPU needs JAX 0.11, this is {jax.__version__}"
    for module, packages in MODULES.items():
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"compiling for CUDA needs {packages}"
    return None


@functools.cache
def mesh(gpus=1) -> Mesh:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{gpus}"
    )
    return Mesh(np.array(topology.devices[:gpus]).reshape(gpus, 1), ("data", "tensor"))


def compile_for_h200(function, *shapes, dump=None, gpus=1):
    """Compile a function of arrays of these shapes, whole on every GPU.

    Mosaic GPU leaves its notes in `dump`.
    """
    whole = NamedSharding(mesh(gpus), PartitionSpec())
    shapes = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=whole), shapes
    )
    notes = {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTXAS": "1"} if dump else {}
    os.environ.update(notes)
    try:
        with jax.sharding.use_abstract_mesh(mesh(gpus).abstract_mesh):
            lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
            return lowered.compile()
    finally:
        for name in notes:
            del os.environ[name]


def resources(dump: Path) -> list[dict[str, int]]:
    """Return registers per thread and spilled bytes of each kernel; empty if not recorded."""
    found = []
    for path in sorted(dump.glob("*.ptxas")):
        text = path.read_text()
        used = re.search(r"Used (\d+) registers", text)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if used and spilled:
            stores, loads = map(int, spilled.groups())
            found.append({"registers": int(used[1]), "stores": stores, "loads": loads})
    return found
