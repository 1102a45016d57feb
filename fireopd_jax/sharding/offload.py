"""Arrays that wait in the host's memory until a program needs them.

    parameters -> in_host_memory -> pinned, in the same shards -> on_devices -> [program]

A device's copy exists while something holds it: once the program that took it has run, its memory
is free again.
"""

from typing import TypeVar

import jax
from jax.sharding import Sharding

Tree = TypeVar("Tree")
DEVICE, HOST = "device", "pinned_host"
"""Kinds of memory, as JAX names them."""


def in_host_memory(tree: Tree) -> Tree:
    """Return the arrays in pinned memory of the devices' hosts, sharded as they were."""
    return _in(tree, HOST)


def on_devices(tree: Tree) -> Tree:
    """Return the arrays in the devices' memory; those that are there are returned themselves."""
    return _in(tree, DEVICE)


def _in(tree: Tree, kind: str) -> Tree:
    def place(leaf: jax.Array) -> Sharding:
        return leaf.sharding.with_memory_kind(kind)

    return jax.device_put(tree, jax.tree.map(place, tree))
