"""Where an array lies: its logical axes -> axes of the mesh.

    ("embed", "heads"), rules {heads: tensor} -> PartitionSpec(None, "tensor")

The logical axes of the parameters are those of `models.weights`. An axis without a rule, and one
whose parts the devices cannot share evenly, is not sharded.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from jax.sharding import Mesh, PartitionSpec

Axis = Literal["layers", "expert", "vocab", "embed", "heads", "kv_heads", "mlp"]
"""Logical axes: what the indices of an array's dimension number."""
Rules = Mapping[Axis, str | tuple[str, ...]]
"""Logical axis -> axis of the mesh that it is sharded over, or axes, the first one outermost."""

TRAIN: Rules = {
    "embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"
}  # fmt: skip
"""In scoring and training: every matrix has one axis of the hidden size, and one other."""

DECODE: Rules = {axis: to for axis, to in TRAIN.items() if to == "tensor"}
"""During rollouts: whole heads, and parts of the MLP and of the vocabulary, on each device."""

WIDE: Rules = {"embed": ("fsdp", "tensor")}
"""In scoring and training, for what `tensor` divides by no other axis: the kernels of routers, and
a table of token ids whose number it does not divide."""


def spec_of(
    axes: Sequence[Axis | None], parts: Sequence[int], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """Return the spec of an array with these logical axes, each divided into `parts` equal parts.

    Raises ValueError where two axes of the array would lie on one axis of the mesh.
    """
    found: dict[str, Axis] = {}
    spec: list[str | tuple[str, ...] | None] = []
    for axis, count in zip(axes, parts, strict=True):
        to = names_of(rules.get(axis) if axis is not None else None)
        size = math.prod(mesh.shape[name] for name in to)
        if axis is None or size == 1 or count % size:
            spec.append(None)
            continue
        for name in to:
            if name in found:
                raise ValueError(
                    f"the axes {found[name]!r} and {axis!r} of an array of axes {tuple(axes)} are "
                    f"both sharded over the mesh's axis {name!r}"
                )
            found[name] = axis
        spec.append(to[0] if len(to) == 1 else to)
    return PartitionSpec(*spec)


def names_of(to: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that one entry of a spec, or of the rules, names."""
    return (to,) if isinstance(to, str) else to or ()
