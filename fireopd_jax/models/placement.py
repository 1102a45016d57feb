"""Sharding of parameters over a mesh, derived from the table of `models.weights`.

In scoring and training, and for whatever is made of parameters (`Placement`), by the rules `TRAIN`.
In the decode layout, over the `tensor` axis, by the rules `DECODE`:

    q, k, v, gate, up    sharded by columns: whole heads, and a part of the MLP, on each device
    o, down              sharded by rows: their products are summed over the axis
    embedding, head      sharded by token id, padded to whole blocks of the sampler

An array whose parts the devices cannot share evenly is replicated, such as k and v when there are
fewer key heads than devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.weights import BY_PATH, Path
from fireopd_jax.sharding.rules import DECODE, TRAIN, Axis, spec_of
from fireopd_jax.types import Array

TOKENS = 128
"""Each device's number of token ids is a multiple of this: the sampler's block."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of parameters in scoring and training, and of the states that are made of them."""

    mesh: Mesh

    @property
    def shards(self) -> bool:
        """Whether any parameter is divided over devices."""
        return self.mesh.shape["fsdp"] > 1

    def of(self, tree: Any) -> Any:
        """Return the sharding of each array, or shape, of a tree.

        A leaf is known by the end of its path, which is that of a parameter. Others, such as the
        small matrices of adapters, are replicated.
        """
        return jax.tree.map_with_path(self._of_leaf, tree)

    def constrain(self, tree: Any) -> Any:
        """Return the arrays of a traced tree, sharded."""
        return jax.lax.with_sharding_constraint(tree, self.of(tree)) if self.shards else tree

    def _of_leaf(self, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        axes = _logical_axes(tuple(str(key.key) for key in path if hasattr(key, "key")))
        if axes is None:
            return NamedSharding(self.mesh, PartitionSpec())
        return NamedSharding(self.mesh, spec_of(axes, leaf.shape, TRAIN, self.mesh))


def sharing(mesh: Mesh | None, rows: int) -> Mesh | None:
    """Return the mesh if it has several devices that share the rows evenly; else None."""
    return mesh if mesh is not None and mesh.size > 1 and rows % mesh.size == 0 else None


def on_own_rows(layer: Callable[..., Array], mesh: Mesh, stacked: Any) -> Callable[..., Array]:
    """Return a decoder layer that each device applies to its own rows.

    `layer` takes states, a layer's parameters, its adapters, and what there is of each row: RoPE
    tables, segments, positions; last a window, the same for all. A matrix is gathered over `fsdp`
    before it is used; its gradient is summed and divided by one reduce-scatter.
    """
    rows, whole, specs = PartitionSpec(mesh.axis_names), PartitionSpec(), _of_layer(mesh, stacked)

    def own(x: Array, part: Any, *others: Any) -> Array:
        return layer(x, _gathered(part, specs), *others)

    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(rows, specs, whole, rows, rows, rows, whole),
        out_specs=rows,
        check_vma=False,
    )


def of_own_rows(table: Array, tokens: Array, mesh: Mesh, dtype: str) -> Array:
    """Return the rows of the embedding for the tokens of each device."""
    rows = PartitionSpec(mesh.axis_names)
    spec = spec_of(("vocab", "embed"), table.shape, TRAIN, mesh)

    def own(part: Array, ids: Array) -> Array:
        return _gathered(part.astype(dtype), spec)[ids]

    run = jax.shard_map(own, mesh=mesh, in_specs=(spec, rows), out_specs=rows, check_vma=False)
    return run(table, tokens)


def _of_layer(mesh: Mesh, stacked: Any) -> Any:
    """Return the specs of one layer's parameters, from the shapes of all layers'."""
    places = Placement(mesh).of({"layers": stacked})["layers"]
    return jax.tree.map(lambda each: PartitionSpec(*each.spec[1:]), places)


def _gathered(tree: Any, specs: Any) -> Any:
    """Return parameters, of which this device has a part, whole."""

    def one(leaf: Array, spec: PartitionSpec) -> Array:
        for axis, name in enumerate(spec):
            if name is not None:
                leaf = jax.lax.all_gather(leaf, name, axis=axis, tiled=True)
        return leaf

    return jax.tree.map(one, tree, specs)


def _logical_axes(names: Path) -> tuple[Axis | None, ...] | None:
    """Return the axes of the parameter that a path ends in; None for any other array."""
    rows = (BY_PATH.get(names[start:]) for start in range(len(names)))
    return next((row.axes for row in rows if row is not None), None)


def tensor_devices(mesh: Mesh | None) -> int:
    """Return the size of the `tensor` axis: the devices that share one model; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["tensor"]


def shard_decode_layout(
    decode_params: dict[str, Any], c: DecoderConfig, mesh: Mesh
) -> dict[str, Any]:
    """Shard parameters in the decode layout; embedding and head are padded with zeros."""
    devices = tensor_devices(mesh)
    heads: dict[Axis | None, int] = {
        "heads": c.num_attention_heads, "kv_heads": c.num_key_value_heads
    }  # fmt: skip

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # A path has dict keys, fields of a `Quantized` and layer indices; only keys have `key`.
        row = BY_PATH[tuple(key.key for key in path if hasattr(key, "key"))]
        axes = row.axes[row.axes[:1] == ("layers",) :]  # one array a layer
        if axes[0] == "vocab":
            leaf = jnp.pad(leaf, ((0, -leaf.shape[0] % (TOKENS * devices)), (0, 0)))
        parts = [
            min(size, heads.get(axis, size))  # a quantized kernel's scale has a single row
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        spec = spec_of(axes, parts, DECODE, mesh)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, decode_params)
