"""Low-rank adapters: a few small matrices learn, the model itself stays as it is.

    W' = W + alpha / rank * A B        A [..., inputs, rank], B [..., rank, outputs], B = 0 at first

    base, adapters -> merge -> parameters like any other: rollouts, scores, the saved model
    base, adapters -> the update, which merges one layer at a time, so that no gradient is ever
                      of the size of the model

A tree of adapters mirrors that of the parameters, with `a` and `b` where a kernel stands. Merged
weights have the type of the base: what is trained, saved and exported are the same bits. While
responses are drawn and scored there is one merged copy beside the base, in the update one layer of
it with `optim.remat: full`.

References: LoRA, arXiv:2106.09685.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt, field_validator

from fireopd_jax.config import config, nearest
from fireopd_jax.types import Array

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
)  # fmt: skip

Adapters = dict[str, Any]
"""Nested dict: the names on the way to a kernel, then `a` and `b`."""


@config
class LoraConfig:
    """Adapters that learn in the student's place."""

    rank: PositiveInt = 16
    """Rank of what is added to a kernel."""
    alpha: PositiveFloat = 32.0
    """What is added is multiplied by alpha / rank."""
    targets: Literal["all"] | tuple[Target, ...] = "all"
    """Linear maps that are adapted, by Hugging Face's names; of experts, each has its own."""

    @field_validator("targets", mode="before")
    @classmethod
    def check_targets(cls, targets: Any) -> Any:
        """Refuse maps that no model has, with the nearest one that it has."""
        if targets == "all":
            return targets
        known = f"known are {', '.join(TARGETS)}, or all"
        if not isinstance(targets, list | tuple) or not targets:
            raise ValueError(f"expected a list of linear maps; {known}")
        for name in targets:
            if name not in TARGETS:
                raise ValueError(
                    f"unknown linear map {name!r}{nearest(str(name), TARGETS)}; {known}"
                )
        return targets

    @property
    def scale(self) -> float:
        """Give alpha / rank."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Tell whether a map of this name has an adapter."""
        return name in (TARGETS if self.targets == "all" else self.targets)

    def init(self, key: Array, params: Mapping[str, Any]) -> Adapters:
        """Draw adapters for the parameters, or for their shapes; at first they add nothing."""
        kernels = list(_kernels(self, params))
        keys = jax.random.split(key, len(kernels))
        adapters: Adapters = {}
        for own, (path, shape) in zip(keys, kernels, strict=True):
            *stacked, inputs, outputs = shape
            bound = inputs**-0.5
            place = adapters
            for name in path:
                place = place.setdefault(name, {})
            place["a"] = jax.random.uniform(
                own, (*stacked, inputs, self.rank), jnp.float32, -bound, bound
            )
            place["b"] = jnp.zeros((*stacked, self.rank, outputs), jnp.float32)
        return adapters

    def scaled(self, adapters: Adapters) -> Adapters:
        """Multiply by alpha / rank what the adapters add."""
        return jax.tree.map_with_path(
            lambda path, leaf: leaf * self.scale if path[-1].key == "b" else leaf, adapters
        )

    def merge(self, params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
        """Give the parameters with the adapters in them."""
        return add(params, self.scaled(adapters))


def add(params: Mapping[str, Any], scaled: Adapters) -> dict[str, Any]:
    """Add scaled adapters to the kernels they belong to: of a whole model, or of one layer."""
    merged = dict(params)
    for name, inner in scaled.items():
        below = params[name]
        if "a" not in inner:
            merged[name] = add(below, inner)
        elif isinstance(below, Mapping):
            merged[name] = {**below, "kernel": _sum(below["kernel"], inner["a"], inner["b"])}
        else:
            merged[name] = _sum(below, inner["a"], inner["b"])
    return merged


def _sum(
    kernel: Float[Array, "*L I O"], a: Float[Array, "*L I R"], b: Float[Array, "*L R O"]
) -> Float[Array, "*L I O"]:
    # The leading axis makes it a batched product. Those are not kept for the backward pass by the
    # policy `dots`, which would hold a second copy of the model.
    batch = tuple(range(a.ndim - 1))
    product = jax.lax.dot_general(
        a[None],
        b[None],
        (((a.ndim,), (a.ndim - 1,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (kernel.astype(jnp.float32) + product[0]).astype(kernel.dtype)


def _kernels(
    lora: LoraConfig, params: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """List path and shape of every kernel that is adapted, in the order of their names."""
    for name in sorted(params):
        inner = params[name]
        kernel = inner.get("kernel") if isinstance(inner, Mapping) else inner
        if kernel is not None and lora.adapts(name):
            yield (*path, name), kernel.shape
        elif isinstance(inner, Mapping):
            yield from _kernels(lora, inner, (*path, name))
