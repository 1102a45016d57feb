"""The device mesh, and what is sharded over its axes.

    data      replicas; each samples the rollouts of its own rows
    fsdp      replicas, too, which share the parameters: each holds a part of every matrix
    tensor    devices of a replica; attention heads, MLPs and vocabulary are sharded over them

In scoring and training all devices share the rows; parameters, gradients and optimizer state are
sharded over `fsdp` and `tensor` (`sharding.rules`) and replicated over `data`. A layer's matrices
are gathered over `fsdp` where they are used; the devices of `tensor` compute parts of a layer, each
for the rows of all of them (`models.shares`). The axes are Auto: the compiler inserts the other
collectives, so statistics over the row axis are global by construction.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import PositiveInt

from fireopd_jax.config import UserError, config
from fireopd_jax.runtime.processes import count
from fireopd_jax.types import Array

Tree = TypeVar("Tree")
AXES = ("data", "fsdp", "tensor")
REPLICAS = ("data", "fsdp")
"""Axes over which the rows of a rollout are sharded."""


@config
class MeshConfig:
    """Shape of the device mesh."""

    data: PositiveInt | None = None
    """Number of replicas, each with its own rollout rows and parameters. null: all devices, divided
    by fsdp and tensor."""
    fsdp: PositiveInt = 1
    """Replicas that share the parameters, gradients and optimizer state in training: each holds a
    part of every matrix. During rollouts each has a whole copy in the compute dtype."""
    tensor: PositiveInt = 1
    """Devices per replica, over which heads, MLPs and vocabulary are sharded: parameters, gradients
    and optimizer state in training, the model and its KV cache during rollouts."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of the configuration; raise `UserError` if the devices do not suffice."""
    devices = devices if devices is not None else jax.devices()
    others = {"fsdp": config.fsdp, "tensor": config.tensor}
    named = {f"mesh.{name}": size for name, size in others.items() if size > 1}
    shared = config.fsdp * config.tensor
    if config.data is None and len(devices) % shared:
        keys = " x ".join(f"{key}={size}" for key, size in named.items())
        raise UserError(
            f"{keys}: does not divide the {len(devices)} devices; set mesh.data too, to leave some "
            "of them idle"
        )
    shape = config.data or len(devices) // shared, config.fsdp, config.tensor
    size = shape[0] * shared
    if size > len(devices):
        keys = " x ".join(["mesh.data", *named])
        raise UserError(f"{keys}: {size} devices asked for, {len(devices)} found")
    kinds, devices = (AxisType.Auto,) * len(AXES), devices[:size]
    try:
        return jax.make_mesh(shape, AXES, kinds, devices=devices)
    except NotImplementedError:  # such as fsdp=8 on 4 x 4 x 4 chips: no product of whole axes
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=kinds)


def by_rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis (the rows) over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_rows(mesh: Mesh, tree: Tree) -> Tree:
    """Shard the arrays of a batch over all devices of the mesh, along the rows."""
    return _put(tree, by_rows(mesh))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Replicate arrays on every device of the mesh."""
    return _put(tree, replicated(mesh))


def _put(tree: Tree, sharding: NamedSharding) -> Tree:
    """Return the tree on the devices; each process gives its own the parts of a host's arrays."""
    if count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree)


def micro_batches(tree: Tree, count: int) -> Tree:
    """Split the rows into `count` micro-batches by stride: [B, ...] -> [count, B / count, ...].

    With a stride every device keeps its own rows; contiguous blocks would need a gather.
    """

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def join_micro_batches(tree: Tree) -> Tree:
    """Join micro-batches in the original row order: the inverse of `micro_batches`."""

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(join, tree)
