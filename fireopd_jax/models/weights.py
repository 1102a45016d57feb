"""The table of our parameters: path, Hugging Face's tensor, logical axes.

    ("layers", "self_attn", "q_proj", "kernel")  <->  model.layers.{i}.self_attn.q_proj.weight, .T
                                                      (layers, embed, heads)

Our parameters are stacked: leading axes for the layer {i} and the expert {e}, then the matrix.
Linear maps are [inputs, outputs] here and [outputs, inputs] in Hugging Face's files. Loading,
export and every placement on a mesh derive from this table.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from fireopd_jax.sharding.rules import Axis

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of the table: a parameter and the tensors that it stacks."""

    path: Path
    """Path of the parameter."""
    name: str
    """Hugging Face's name, with {i} for the layer and {e} for the expert."""
    own: tuple[Axis | None, ...]
    """Logical axes of one tensor as we have it."""
    transposed: bool = False
    """Whether the tensor is the transpose of our matrix."""

    @property
    def stacked(self) -> int:
        """Number of stacked leading axes (layer, expert) of the parameter."""
        return self.name.count("{")

    @property
    def axes(self) -> tuple[Axis | None, ...]:
        """Logical axes of the parameter, those of stacked layers and experts included."""
        stacks: tuple[Axis, ...] = ("layers", "expert")
        return (*stacks[: self.stacked], *self.own)

    def hf_name(self, index: tuple[int, ...]) -> str:
        """Return the tensor's name for one layer and expert."""
        return self.name.format(**dict(zip("ie", index, strict=False)))

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one tensor, from the shape of our parameter."""
        own = ours[self.stacked :]
        return own[::-1] if self.transposed else own


LAYER = "model.layers.{i}."
LINEAR: Mapping[str, tuple[Axis | None, Axis | None]] = {
    "self_attn.q_proj": ("embed", "heads"),
    "self_attn.k_proj": ("embed", "kv_heads"),
    "self_attn.v_proj": ("embed", "kv_heads"),
    "self_attn.o_proj": ("heads", "embed"),
    "mlp.gate_proj": ("embed", "mlp"),
    "mlp.up_proj": ("embed", "mlp"),
    "mlp.down_proj": ("mlp", "embed"),
    "mlp.gate": ("embed", None),
}
"""Linear maps of a layer, the router of its experts included: logical axes of inputs and outputs.
"""
EXPERTS = ("gate_proj", "up_proj", "down_proj")
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)


def _kernel(name: str, axes: tuple[Axis | None, Axis | None]) -> Weight:
    path = ("layers", *name.split("."), "kernel")
    return Weight(path, f"{LAYER}{name}.weight", axes, transposed=True)


def _bias(name: str, axes: tuple[Axis | None, Axis | None]) -> Weight:
    # One that is added to a sum over devices, as after o_proj, is whole on each.
    inputs, outputs = axes
    own = None if inputs != "embed" else outputs
    return Weight(("layers", *name.split("."), "bias"), f"{LAYER}{name}.bias", (own,))


def _experts(name: str) -> Weight:
    path, axes = ("layers", "mlp", "experts", name), LINEAR[f"mlp.{name}"]
    return Weight(path, f"{LAYER}mlp.experts.{{e}}.{name}.weight", axes, transposed=True)


TABLE = (
    Weight(("embed_tokens",), "model.embed_tokens.weight", ("vocab", "embed")),
    *(Weight(("layers", *n.split("."), "scale"), f"{LAYER}{n}.weight", (None,)) for n in NORMS),
    *(_kernel(*linear) for linear in LINEAR.items()),
    *(_bias(*linear) for linear in LINEAR.items()),
    *(_experts(name) for name in EXPERTS),
    Weight(("norm", "scale"), "model.norm.weight", (None,)),
    Weight(("lm_head",), "lm_head.weight", ("vocab", "embed")),
)
"""Every weight of any family; a model has those whose path is among its parameters."""
BY_PATH: Mapping[Path, Weight] = {row.path: row for row in TABLE}


def _adapters(row: Weight) -> dict[Path, tuple[Axis | None, ...]]:
    """Return the axes of a linear map's adapters: A [inputs, rank], B [rank, outputs]."""
    *stacks, inputs, outputs = row.axes
    path = row.path[:-1] if row.path[-1] == "kernel" else row.path
    return {(*path, "a"): (*stacks, inputs, None), (*path, "b"): (*stacks, None, outputs)}


AXES: Mapping[Path, tuple[Axis | None, ...]] = {row.path: row.axes for row in TABLE} | {
    path: axes for row in TABLE if row.transposed for path, axes in _adapters(row).items()
}
"""Logical axes of every parameter, and of the adapters of every linear map."""


def axes_of(names: Path) -> tuple[Axis | None, ...] | None:
    """Return the axes of the parameter or adapter that a path ends in; None for another array."""
    found = (AXES.get(names[start:]) for start in range(len(names)))
    return next((axes for axes in found if axes is not None), None)


def flat(path: tuple) -> Path:
    """Return a leaf's path of `jax.tree` as a tuple of names."""
    return tuple(str(key.key) for key in path)


def names_in(path: tuple) -> Path:
    """Return the names in a leaf's path that has layer indices and fields, too.

    Such fields are those of a `Quantized`, or of an optimizer's state.
    """
    return tuple(str(key.key) for key in path if hasattr(key, "key"))


def indices(row: Weight, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the indices (layer, expert) of a stacked parameter, layer by layer."""
    return itertools.product(*(range(n) for n in shape[: row.stacked]))
