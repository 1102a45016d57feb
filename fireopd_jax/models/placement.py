"""Where a model that is laid out for decoding lies on the `tensor` axis of its mesh.

    q, k, v, gate, up    columns: a device has whole heads, and its part of the MLP
    o, down              rows: the products are summed over the axis
    embedding, head      words, filled up to whole blocks of the sampler's

What does not divide lies whole on every device: fewer key heads than devices, say.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import DecoderConfig

COLUMNS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
ROWS = {"o_proj", "down_proj"}
TABLES = {"embed_tokens", "lm_head"}
WORDS = 128
"""A device's part of the vocabulary is a multiple of it."""


def tensor_devices(mesh: Mesh | None) -> int:
    """Count the devices that share a model."""
    return 1 if mesh is None else mesh.shape["tensor"]


def over_tensor(ndim: int, axis: int, parts: int, devices: int) -> PartitionSpec:
    """Split one axis over the devices, if they can share its `parts` evenly."""
    spec: list[str | None] = [None] * ndim
    if devices > 1 and parts % devices == 0:
        spec[axis] = "tensor"
    return PartitionSpec(*spec)


def shard_decode_layout(
    decode_params: dict[str, Any], c: DecoderConfig, mesh: Mesh
) -> dict[str, Any]:
    """Split the parameters that `LanguageModel.to_decode_layout` has laid out."""
    devices = tensor_devices(mesh)
    heads = {"q_proj": c.num_attention_heads, "o_proj": c.num_attention_heads}
    heads |= {"k_proj": c.num_key_value_heads, "v_proj": c.num_key_value_heads}

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        # Keys of a dict, fields of a `Quantized`, indices of layers.
        names = {str(getattr(key, "key", "")) for key in path}
        spec = PartitionSpec()
        if names & TABLES:
            leaf = jnp.pad(leaf, ((0, -leaf.shape[0] % (WORDS * devices)), (0, 0)))
            spec = PartitionSpec("tensor")
        for name in names & COLUMNS:
            spec = over_tensor(leaf.ndim, -1, heads.get(name, leaf.shape[-1]), devices)
        for name in names & ROWS:
            if leaf.ndim > 1:  # a bias is added to the sum
                spec = over_tensor(leaf.ndim, -2, heads.get(name, leaf.shape[-2]), devices)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, decode_params)
