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

COLUMNS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
ROWS = {"o_proj", "down_proj"}
TABLES = {"embed_tokens", "lm_head"}
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
    heads = {"q_proj": c.num_attention_heads, "o_proj": c.num_attention_heads}
    heads |= {"k_proj": c.num_key_value_heads, "v_proj": c.num_key_value_heads}

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # A path has dict keys, fields of a `Quantized` and layer indices; only keys have `key`.
        names = {str(getattr(key, "key", "")) for key in path}
        spec = PartitionSpec()
        if names & TABLES:
            leaf = jnp.pad(leaf, ((0, -leaf.shape[0] % (TOKENS * devices)), (0, 0)))
            spec = PartitionSpec("tensor")
        for name in names & COLUMNS:
            spec = over_tensor(leaf.ndim, -1, heads.get(name, leaf.shape[-1]), devices)
        for name in names & ROWS:
            if leaf.ndim > 1:  # A bias is replicated: it is added after the sum over the axis.
                spec = over_tensor(leaf.ndim, -2, heads.get(name, leaf.shape[-2]), devices)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, decode_params)
