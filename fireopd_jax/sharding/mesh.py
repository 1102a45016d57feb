"""The mesh, and what lies on which of its axes.

    data      replicas, each of which draws its own rows
    tensor    devices of a replica: they share a model's heads, its MLPs and its vocabulary there

That is how rows are drawn. Where rows are scored and learnt from they lie over all devices, and
parameters and optimizer state lie whole on each. The axes are Auto: the compiler inserts the
collectives, so statistics over the row axis are global by construction.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import PositiveInt

from fireopd_jax.config import UserError, config
from fireopd_jax.types import Array

Tree = TypeVar("Tree")
AXES = ("data", "tensor")


@config
class MeshConfig:
    """How the devices are laid."""

    data: PositiveInt | None = None
    """Replicas that draw rows of their own; by default as many as the devices make."""
    tensor: PositiveInt = 1
    """Devices of a replica, which share the model and its cache while they draw."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay the devices as the configuration says."""
    devices = devices if devices is not None else jax.devices()
    if config.data is None and len(devices) % config.tensor:
        raise UserError(
            f"mesh.tensor={config.tensor}: does not divide the {len(devices)} devices; give "
            "mesh.data too, to leave some of them idle"
        )
    shape = config.data or len(devices) // config.tensor, config.tensor
    size = shape[0] * shape[1]
    if size > len(devices):
        keys = "mesh.data" if config.tensor == 1 else "mesh.data x mesh.tensor"
        raise UserError(f"{keys}: {size} devices asked for, {len(devices)} found")
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=devices[:size])


def by_rows(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_rows(mesh: Mesh, tree: Tree) -> Tree:
    """Put the arrays of a batch onto the mesh, split by rows."""
    return jax.device_put(tree, by_rows(mesh))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Put arrays onto every device of the mesh."""
    return jax.device_put(tree, replicated(mesh))


def micro_batches(tree: Tree, count: int) -> Tree:
    """Split the rows into `count` micro-batches by stride: [B, ...] -> [count, B / count, ...].

    A stride leaves every device its own rows; contiguous blocks would be gathered.
    """

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def join_micro_batches(tree: Tree) -> Tree:
    """Undo `micro_batches`."""

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(join, tree)
