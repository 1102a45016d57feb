"""Low-rank adapters (LoRA): small matrices are trained, the model itself is frozen.

    W' = W + alpha / rank * A B        A [..., inputs, rank], B [..., rank, outputs], B = 0 at first

    base, adapters -> merge -> parameters for rollouts, scoring and the saved model
    base, adapters -> the update, which merges one layer at a time, so that no gradient has the
                      size of the model

A tree of adapters has the structure of the parameters, with `a` and `b` in place of a kernel.
Merged weights are rounded to the base's dtype everywhere, so the trained, saved and exported models
have the same bits. Rollouts and scoring hold one merged copy of the model in addition to the base;
the update holds one merged layer with `optim.remat: full`.

References: LoRA, arXiv:2106.09685, Section 4.1.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import Field, PositiveFloat, field_validator

from fireopd_jax.config import config, nearest
from fireopd_jax.types import Array

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
)  # fmt: skip

Adapters = dict[str, Any]
"""Nested dict: the path of each adapted kernel, then `a` and `b`."""


@config
class LoraConfig:
    """Low-rank adapters that are trained instead of the student's parameters."""

    rank: Annotated[int, Field(gt=0, le=2**16)] = 16
    """Rank of the update A B of each kernel."""
    alpha: PositiveFloat = 32.0
    """The update A B is multiplied by alpha / rank."""
    targets: Literal["all"] | tuple[Target, ...] = "all"
    """Linear maps that are adapted, by Hugging Face's names; each expert has its own adapter."""

    @field_validator("targets", mode="before")
    @classmethod
    def check_targets(cls, targets: Any) -> Any:
        """Raise ValueError for an unknown or empty list; name the nearest known map."""
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
        """The factor alpha / rank."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Return whether linear maps of this name are adapted."""
        return name in (TARGETS if self.targets == "all" else self.targets)

    def init(self, key: Array, params: Mapping[str, Any]) -> Adapters:
        """Return random A and zero B for each adapted kernel of the parameters (arrays or shapes).

        A ~ U(-1/sqrt(inputs), 1/sqrt(inputs)), float32; the initial update A B is 0.
        """
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
        """Return the adapters with B multiplied by alpha / rank."""
        return jax.tree.map_with_path(
            lambda path, leaf: leaf * self.scale if path[-1].key == "b" else leaf, adapters
        )

    def merge(self, params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
        """Return the merged parameters W + alpha / rank A B, in the dtype of W."""
        return add(params, self.scaled(adapters))


def add(params: Mapping[str, Any], scaled: Adapters) -> dict[str, Any]:
    """Return the parameters of a model or layer with scaled adapters added to their kernels."""
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
    # The extra leading axis makes this a batched product, which the remat policy `dots` does not
    # save: saving it would keep a second copy of the model for the backward pass.
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
    """Yield path and shape of every adapted kernel, sorted by name."""
    for name in sorted(params):
        inner = params[name]
        kernel = inner.get("kernel") if isinstance(inner, Mapping) else inner
        if kernel is not None and lora.adapts(name):
            yield (*path, name), kernel.shape
        elif isinstance(inner, Mapping):
            yield from _kernels(lora, inner, (*path, name))
