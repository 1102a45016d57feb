"""Sharding of parameters over a mesh, derived from the table of `models.weights`.

In scoring and training, and for whatever is made of parameters (`Placement`), by the rules `TRAIN`;
`models.shares` computes with the parts. In the decode layout, over the `tensor` axis, by the rules
`DECODE`:

    q, k, v, gate, up    sharded by columns: whole heads, and a part of the MLP, on each device
    o, down              sharded by rows: their products are summed over the axis
    embedding, head      sharded by token id, padded to whole blocks of the sampler

An array whose parts the devices cannot share evenly is replicated, such as k and v when there are
fewer key heads than devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.quantized import is_quantized, scale_place
from fireopd_jax.models.weights import BY_PATH, axes_of, names_in
from fireopd_jax.sharding.rules import DECODE, TRAIN, WIDE, Axis, spec_of

TOKENS = 128
"""Each device's number of token ids is a multiple of this: the sampler's block."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of parameters in scoring and training, and of the states that are made of them."""

    mesh: Mesh

    @property
    def parts(self) -> int:
        """Number of parts that a matrix is divided into."""
        return self.mesh.shape["fsdp"] * tensor_devices(self.mesh)

    def of(self, tree: Any) -> Any:
        """Return the sharding of each array, or shape, of a tree.

        A leaf is known by the end of its path, which is that of a parameter or adapter. Others are
        replicated.
        """
        return jax.tree.map_with_path(self._of_leaf, tree, is_leaf=is_quantized)

    def constrain(self, tree: Any) -> Any:
        """Return the arrays of a traced tree, sharded."""
        return jax.lax.with_sharding_constraint(tree, self.of(tree)) if self.parts > 1 else tree

    def _of_leaf(self, path: tuple[Any, ...], leaf: Any) -> Any:
        axes, spec = axes_of(names_in(path)), PartitionSpec()
        if axes is not None:
            spec = spec_of(axes, leaf.shape, TRAIN, self.mesh)
            if tensor_devices(self.mesh) > 1 and "tensor" not in spec:
                wide = spec_of(axes, leaf.shape, WIDE, self.mesh)
                spec = wide if any(wide) else spec
        place = NamedSharding(self.mesh, spec)
        if not is_quantized(leaf):
            return place
        return jax.tree.map(
            lambda x: place if x.shape == leaf.shape else scale_place(place, x.ndim), leaf
        )


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
        row = BY_PATH[names_in(path)]
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
