"""A layer that the devices of a mesh compute, each for its own rows.

    states of own rows -> norm -> gathered over `tensor` -> own heads, or own part of the MLP
                       -> summed over `tensor`, each device receives its rows -> residual

The devices of a replica share a layer: each has a part of its heads and of its MLP, and computes it
for the rows of the replica. Between two blocks a device has its own rows alone, so norms and saved
states cost each a part. Where the parts are not whole heads, a device computes the whole block for
its own rows. A matrix is gathered over `fsdp` before it is used; the sum of its gradient is a
reduce-scatter.

References: arXiv 2205.05198 (sequence parallelism), with rows in place of positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.placement import Placement, tensor_devices
from fireopd_jax.models.weights import LINEAR, axes_of, names_in
from fireopd_jax.sharding.mesh import REPLICAS
from fireopd_jax.sharding.rules import TRAIN, WIDE, Rules, names_of
from fireopd_jax.types import Array

TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class Share:
    """How a device computes a block: all of it, or one of `parts` for the rows of its replica."""

    parts: int = 1

    def gathered(self, x: Array) -> Array:
        """Return the rows that a device computes its part of the block for."""
        return x if self.parts == 1 else lax.all_gather(x, TENSOR, axis=0, tiled=True)

    def summed(self, x: Array) -> Array:
        """Return the sum of all parts, of a device's own rows."""
        return x if self.parts == 1 else lax.psum_scatter(x, TENSOR, tiled=True)


@dataclasses.dataclass(frozen=True)
class Shares:
    """How a device computes a layer."""

    attention: Share = Share()
    mlp: Share = Share()
    key_heads: int = 1
    """Of the layer; fewer than the parts of attention where several devices read the same one."""

    @classmethod
    def of(cls, c: DecoderConfig, mesh: Mesh) -> "Shares":
        """Return the shares of the devices of `tensor`, as far as they come out even.

        Key heads do if the devices divide them, or the other way round.
        """
        parts, heads = tensor_devices(mesh), c.num_key_value_heads
        whole = c.num_attention_heads % parts == 0 and (heads % parts == 0 or parts % heads == 0)
        inner = c.intermediate_size if c.moe is None else c.moe.moe_intermediate_size
        return cls(Share(parts if whole else 1), Share(parts if inner % parts == 0 else 1), heads)


def sharing(mesh: Mesh | None, rows: int) -> Mesh | None:
    """Return the mesh if it has several devices that share the rows evenly; else None."""
    return mesh if mesh is not None and mesh.size > 1 and rows % mesh.size == 0 else None


def of_replica(tree: Any, shares: Shares, mesh: Mesh) -> Any:
    """Return what attention reads of each row, on every device that computes a part of it."""
    if shares.attention.parts == 1:
        return tree
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(REPLICAS)))


def on_own_rows(
    layer: Callable[..., Array], shares: Shares, mesh: Mesh, stacked: Any, low_rank: Any
) -> Callable[..., Array]:
    """Return a decoder layer that each device applies to its own rows.

    `layer` takes states, a layer's parameters, its adapters, and what attention reads of each row:
    RoPE tables, segments, positions; last a window, the same for all. `stacked` and `low_rank` have
    the shapes of all layers' parameters and adapters.
    """
    rows = PartitionSpec(mesh.axis_names)
    read = PartitionSpec(REPLICAS) if shares.attention.parts > 1 else rows
    trees = {"layers": stacked}, {"layers": low_rank}
    specs = [_of_layer(mesh, tree) for tree in trees]
    uses = [_uses(own, shares) for own in specs]

    def own(x: Array, part: Any, adapters: Any, *others: Any) -> Array:
        ready = (
            jax.tree.map(lambda use, leaf: use(leaf), *each)
            for each in zip(uses, (part, adapters), strict=True)
        )
        return layer(x, *ready, *others)

    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(rows, *specs, read, read, read, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )


def of_own_rows(table: Array, tokens: Array, mesh: Mesh, dtype: str) -> Array:
    """Return the rows of the embedding for the tokens of each device.

    Each device of a replica looks up the tokens of all in its own part of the table.
    """
    rows = PartitionSpec(mesh.axis_names)
    spec = Placement(mesh).of({"embed_tokens": table})["embed_tokens"].spec

    def own(part: Array, ids: Array) -> Array:
        part = _gathered(part.astype(dtype), 1, spec[1])
        if spec[0] is None:
            return part[ids]
        ids = lax.all_gather(ids, TENSOR, axis=0, tiled=True)
        ids = ids - lax.axis_index(TENSOR) * part.shape[0]
        inside = (ids >= 0) & (ids < part.shape[0])
        found = jnp.where(inside[..., None], part[jnp.where(inside, ids, 0)], 0)
        return lax.psum_scatter(found, TENSOR, tiled=True)

    run = jax.shard_map(own, mesh=mesh, in_specs=(spec, rows), out_specs=rows, check_vma=False)
    return run(table, tokens)


def head_in_parts(head: Array, mesh: Mesh | None) -> Array:
    """Return a head [V, D] of which each device of `tensor` has the rows of its own token ids.

    Where V does not divide, there are rows of zeros at the end, whose ids are not valid.
    """
    if mesh is None or head.shape[0] % tensor_devices(mesh) == 0:
        return head
    spec = Placement(mesh).of({"lm_head": head})["lm_head"].spec
    return _in_parts(head, mesh) if TENSOR in names_of(spec[1]) else head


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_parts(head: Array, mesh: Mesh) -> Array:
    missing = -head.shape[0] % tensor_devices(mesh)

    def own(columns: Array) -> Array:
        columns = jnp.pad(columns, ((0, missing), (0, 0)))
        return lax.all_to_all(columns, TENSOR, split_axis=0, concat_axis=1, tiled=True)

    return _between(own, mesh, WIDE, TRAIN)(head)


def _of_columns(mesh: Mesh, count: int, d_head: Array) -> tuple[Array]:
    def own(rows: Array) -> Array:
        return lax.all_to_all(rows, TENSOR, split_axis=1, concat_axis=0, tiled=True)[:count]

    return (_between(own, mesh, TRAIN, WIDE)(d_head),)


_in_parts.defvjp(lambda head, mesh: (_in_parts(head, mesh), head.shape[0]), _of_columns)


def _between(own: Callable[[Array], Array], mesh: Mesh, source: Rules, target: Rules) -> Any:
    """Return the function of a table's parts on all devices, by the rules of source and target."""
    one, other = (PartitionSpec(rules.get("vocab"), rules["embed"]) for rules in (source, target))
    return jax.shard_map(own, mesh=mesh, in_specs=one, out_specs=other, check_vma=False)


def _of_layer(mesh: Mesh, tree: Any) -> Any:
    """Return the specs of one layer's arrays, from the shapes of all layers'."""
    places = Placement(mesh).of(tree)["layers"]
    return jax.tree.map(lambda each: PartitionSpec(*each.spec[1:]), places)


def _uses(specs: Any, shares: Shares) -> Any:
    """Return, for each array of a layer, the function from a device's part of it to what is used.

    That is a part where the device's share of the block is one, and else the whole.
    """

    def of_leaf(path: tuple[Any, ...], spec: PartitionSpec) -> Callable[[Array], Array]:
        names = ("layers", *names_in(path))
        share = shares.attention if "self_attn" in names else shares.mlp
        axes = (axes_of(names) or ())[1:]
        added = names[-1] == "bias" and LINEAR[".".join(names[1:-1])][0] != "embed"

        def use(leaf: Array) -> Array:
            for axis, (logical, to) in enumerate(zip(axes, spec, strict=True)):
                one_head = logical == "kv_heads" and shares.key_heads % share.parts > 0
                if to != TENSOR or share.parts == 1 or one_head:
                    leaf = _gathered(leaf, axis, to)
                if one_head:
                    leaf = _of_own_key_head(leaf, axis, shares)
            if added and share.parts > 1:  # to the sum of all parts, by one of them
                leaf = jnp.where(lax.axis_index(TENSOR) == 0, leaf, 0)
            return leaf

        return use

    return jax.tree.map_with_path(of_leaf, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _of_own_key_head(leaf: Array, axis: int, shares: Shares) -> Array:
    """Return the columns of the one key head that a device's query heads read."""
    head = lax.axis_index(TENSOR) * shares.key_heads // shares.attention.parts
    width = leaf.shape[axis] // shares.key_heads
    return lax.dynamic_slice_in_dim(leaf, head * width, width, axis)


def _gathered(leaf: Array, axis: int, to: Any) -> Array:
    """Return an array whose `axis` lies over the mesh axes `to`, whole along it."""
    names = names_of(to)
    return lax.all_gather(leaf, names, axis=axis, tiled=True) if names else leaf
