"""Sharding of parameters in the decode layout over the `tensor` axis of a mesh.

    q, k, v, gate, up    sharded by columns: whole heads, and a part of the MLP, on each device
    o, down              sharded by rows: their products are summed over the axis
    embedding, head      sharded by token id, padded to whole blocks of the sampler

An array whose parts the devices cannot share evenly is replicated, such as k and v when there are
fewer key heads than devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.weights import BY_PATH
from fireopd_jax.sharding.rules import DECODE, Axis, spec_of

TOKENS = 128
"""Each device's number of token ids is a multiple of this: the sampler's block."""


def tensor_devices(mesh: Mesh | None) -> int:
    """Return the size of the `tensor` axis: the devices that share one model; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["tensor"]


def over_tensor(ndim: int, axis: int, parts: int, devices: int) -> PartitionSpec:
    """Return the spec that shards one axis, or no axis if `parts` is no multiple of `devices`."""
    spec: list[str | None] = [None] * ndim
    if devices > 1 and parts % devices == 0:
        spec[axis] = "tensor"
    return PartitionSpec(*spec)


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
