"""Where an array lies: its logical axes -> axes of the mesh.

    ("embed", "heads"), rules {heads: tensor} -> PartitionSpec(None, "tensor")

The logical axes of the parameters are those of `models.weights`. An axis without a rule, and one
whose parts the devices cannot share evenly, is not sharded.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from jax.sharding import Mesh, PartitionSpec

Axis = Literal["layers", "expert", "vocab", "embed", "heads", "kv_heads", "mlp"]
"""Logical axes: what the indices of an array's dimension number."""
Rules = Mapping[Axis, str]
"""Logical axis -> axis of the mesh that it is sharded over."""

DECODE: Rules = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
"""During rollouts: whole heads, and parts of the MLP and of the vocabulary, on each device."""

TRAIN: Rules = {"embed": "fsdp"}
"""In scoring and training: every matrix has one axis of the hidden size."""


def spec_of(
    axes: Sequence[Axis | None], parts: Sequence[int], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """Return the spec of an array with these logical axes, each divided into `parts` equal parts.

    Raises ValueError where two axes of the array would lie on one axis of the mesh.
    """
    found: dict[str, Axis] = {}
    spec: list[str | None] = []
    for axis, count in zip(axes, parts, strict=True):
        to = rules.get(axis) if axis is not None else None
        if axis is None or to is None or mesh.shape[to] == 1 or count % mesh.shape[to]:
            spec.append(None)
            continue
        if to in found:
            raise ValueError(
                f"the axes {found[to]!r} and {axis!r} of an array of axes {tuple(axes)} are both "
                f"sharded over the mesh's axis {to!r}"
            )
        found[to] = axis
        spec.append(to)
    return PartitionSpec(*spec)
