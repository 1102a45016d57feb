"""Which layout of the KV cache a rollout has: the one that is named, or that of the platform."""

from typing import Literal

from jax.sharding import Mesh

from fireopd_jax.config import config
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.placement import tensor_devices
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU, page_for
from fireopd_jax.rollout.state import slots_of
from fireopd_jax.runtime.target import platform

CacheLayout = Dense | Paged
"""Layouts of the KV cache."""


@config
class Auto(Dense):
    """The layout that suits the platform: `paged_tpu` on a TPU, where it can be, else `dense`.

    On a TPU, XLA keeps a dense cache in one order of its axes for writing and in another for
    reading: it copies the whole cache in every step, and takes twice its memory.
    """

    kind: Literal["auto"] = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]


AUTO = Auto()


def layout_of(
    memory: CacheLayout,
    model: DecoderConfig,
    mesh: Mesh | None,
    positions: int,
    slots: int | None = None,
) -> CacheLayout:
    """Return the layout of a model's cache with so many positions a slot; `Auto` is replaced."""
    if not isinstance(memory, Auto):
        return memory
    pages = platform() == "tpu" and memory.dtype == "model"
    if pages and model.num_key_value_heads % tensor_devices(mesh) == 0:
        return PagedTPU(page_size=page_for(slots_of(slots), positions))
    return Dense(dtype=memory.dtype)
