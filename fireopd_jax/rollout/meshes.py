"""Sharding of a rollout over a mesh: one loop for each replica, whose devices share its work.

data, fsdp  manual (`shard_map`): one loop for each replica, no communication between replicas
tensor      automatic: XLA follows the shardings of parameters and cache; manual for sampling only
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, Key

from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.placement import tensor_devices
from fireopd_jax.rollout.sampling import Draw, Sampling, draw
from fireopd_jax.sharding.mesh import REPLICAS
from fireopd_jax.sharding.rules import DECODE, Axis, spec_of
from fireopd_jax.types import Array


def replica_count(mesh: Mesh | None) -> int:
    """Return the number of replicas: the size of the axes `REPLICAS`; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in REPLICAS)


def over_data(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Return the function mapped over the replicas, each on its own rows.

    With several devices on `tensor`, that axis stays automatic. Else all axes are manual, which
    library kernels require.
    """
    if mesh is None or mesh.size == 1:
        return function
    manual = set(REPLICAS) if tensor_devices(mesh) > 1 else set(mesh.axis_names)
    # Replicas run different numbers of loop iterations, which the VMA check cannot express.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=manual,
        check_vma=False,
    )


def draw_over(
    mesh: Mesh | None,
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    position: Int32[Array, " B"],
) -> Draw:
    """Sample one token for each row; each device of a replica reads its own columns only."""
    if tensor_devices(mesh) == 1:
        return draw(logits, keys, sampling, position)
    whole, columns = PartitionSpec(), PartitionSpec(None, "tensor")
    # No mesh argument: this runs inside `over_data`, whose mesh applies.
    return jax.shard_map(
        lambda *arguments: draw(*arguments, axis="tensor"),
        in_specs=(columns, whole, whole, whole),
        out_specs=whole,
        axis_names={"tensor"},
        check_vma=False,
    )(logits, keys, sampling, position)


def cache_spec(ndim: int, memory: Any, model: LanguageModel, mesh: Mesh | None) -> PartitionSpec:
    """Return the spec of a cache array: key heads over `tensor`, if the axis divides them."""
    if mesh is None or ndim < 4:  # Page tables are replicated.
        return PartitionSpec()
    axes: list[Axis | None] = [None] * ndim
    axes[memory.heads_axis] = "kv_heads"
    return spec_of(axes, [model.config.num_key_value_heads] * ndim, DECODE, mesh)


def split_cache(cache: Any, memory: Any, model: LanguageModel, mesh: Mesh | None) -> Any:
    """Return a new cache sharded over the devices of its replica."""
    if tensor_devices(mesh) == 1:
        return cache

    def split(leaf: Array) -> Array:
        spec = cache_spec(leaf.ndim, memory, model, mesh)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map(split, cache)


def state_shardings(state: Any, memory: Any, model: LanguageModel, mesh: Mesh | None) -> Any:
    """Return the shardings of a state stacked over the replicas; None on one device."""
    if mesh is None or mesh.size == 1:
        return None
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(REPLICAS)), state)

    def place(leaf: Any) -> NamedSharding:
        spec = cache_spec(leaf.ndim - 1, memory, model, mesh)
        return NamedSharding(mesh, PartitionSpec(REPLICAS, *spec))

    return dataclasses.replace(places, cache=jax.tree.map(place, state.cache))
