"""Checks of a configuration against the devices of this machine, before any computation.

Config, mesh -> None, or UserError naming the key
"""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from fireopd_jax.config import UserError
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.ops.dispatch import IMPLEMENTATIONS, PLATFORMS
from fireopd_jax.recipe.schema import Config
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.layouts import CacheLayout
from fireopd_jax.rollout.meshes import replica_count
from fireopd_jax.rollout.state import Shape
from fireopd_jax.runtime.target import platform

CACHES = {"dense_gpu": "gpu", "paged_tpu": "tpu", "paged_gpu": "gpu"}
"""Platform of each cache kind with a kernel."""


def check_training_batches(
    config: Config, mesh: Mesh, drawing: Mapping[str, DecoderConfig]
) -> None:
    """Raise UserError for batch sizes, caches or kernels that do not fit the devices.

    `drawing` are the models that responses are sampled from, by name.
    """
    check_kernel(config.method.score.head)
    check_cache(config, mesh, drawing)
    sizes = {
        "rollout.batch_size": config.rollout.batch_size,
        "optim.micro_batch_size": config.optim.micro_batch_size,
        "method.score.micro_batch_size": config.method.score.micro_batch_size,
        "eval.batch_size": config.eval.batch_size,
    }
    teachers = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    for key, model in {"student": config.student, **teachers}.items():
        if model.sft is not None:
            sizes[f"{key}.sft.batch_size"] = model.sft.batch_size
            sizes[f"{key}.sft.optim.micro_batch_size"] = model.sft.optim.micro_batch_size
    check_divisible(sizes, mesh)


def check_cache(config: Config, mesh: Mesh, drawing: Mapping[str, DecoderConfig]) -> None:
    """Raise UserError for a cache of another platform, of other models, or below one response."""
    rollout = config.rollout
    here = platform()
    if CACHES.get(rollout.cache.kind, here) != here:
        raise UserError(
            f"rollout.cache.kind={rollout.cache.kind} runs on "
            f"{CACHES[rollout.cache.kind].upper()} only, this machine has {here.upper()}; "
            "expected dense or paged"
        )
    check_heads(rollout.cache.kind, mesh.shape["tensor"], drawing)
    for name, model in drawing.items():
        check_model(rollout.cache, model, name)
    check_pages(config, mesh, rollout.batch_size, config.data.max_prompt_tokens, rollout.max_tokens)


def check_heads(kind: str, tensor: int, drawing: Mapping[str, DecoderConfig]) -> None:
    """Raise UserError for a kernel that the devices of a replica cannot share."""
    if tensor == 1 or kind not in CACHES:
        return
    if kind != "paged_tpu":
        raise UserError(
            f"rollout.cache.kind={kind}: its kernel does not support mesh.tensor={tensor}; "
            "expected mesh.tensor=1, dense or paged"
        )
    for name, model in drawing.items():
        heads = model.num_key_value_heads
        if heads % tensor:
            raise UserError(
                f"{name}: rollout.cache.kind={kind}: mesh.tensor={tensor} does not divide its "
                f"{heads} key heads; expected a tensor axis that does, dense or paged"
            )


def check_pages(
    config: Config, mesh: Mesh, batch_size: int, prompt_tokens: int, max_tokens: int
) -> None:
    """Raise UserError for a cache of pages that cannot hold one prompt and response."""
    cache = config.rollout.cache
    if isinstance(cache, Paged):
        rows = max(1, batch_size // replica_count(mesh))
        shape = Shape.of(rows, prompt_tokens, max_tokens, config.rollout.slots, cache.align)
        cache.pages(shape)


def check_model(cache: CacheLayout, model: DecoderConfig, name: str) -> None:
    """Raise UserError for a model whose keys and values this kind of cache cannot hold."""
    # The number of pages is checked elsewhere.
    enough = dataclasses.replace(cache, tokens=None) if isinstance(cache, Paged) else cache
    try:
        jax.eval_shape(lambda: enough.init(model, Shape.of(2, cache.align, cache.align)))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check_kernel(name: str | None) -> None:
    """Raise UserError for a head implementation of another platform."""
    here = platform()
    if name is None or PLATFORMS.get(name, here) == here:
        return
    able = [each for each in IMPLEMENTATIONS if PLATFORMS.get(each, here) == here]
    raise UserError(
        f"method.score.head={name} runs on {PLATFORMS[name].upper()} only, this machine has "
        f"{here.upper()}; expected one of {', '.join(able)}"
    )


def check_divisible(sizes: Mapping[str, int | None], mesh: Mesh) -> None:
    """Raise UserError for the first size, by key, that the number of devices does not divide."""
    for key, size in sizes.items():
        if size is not None and size % mesh.size:
            raise UserError(
                f"{key}={size} is not divisible by the {mesh.size} devices of the mesh (mesh.data, "
                "mesh.fsdp, mesh.tensor)"
            )
