"""The table of our parameters and Hugging Face's tensors, which loading and export share.

    ("layers", "self_attn", "q_proj", "kernel")  <->  model.layers.{i}.self_attn.q_proj.weight, .T

Our parameters are stacked: leading axes for the layer {i} and the expert {e}, then the matrix.
Linear maps are [inputs, outputs] here and [outputs, inputs] in Hugging Face's files.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.quantized import Quantized, dequantize, is_quantized

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of the table: a parameter and the tensors that it stacks."""

    path: Path
    """Path of the parameter."""
    name: str
    """Hugging Face's name, with {i} for the layer and {e} for the expert."""
    transposed: bool = False
    """Whether the tensor is the transpose of our matrix."""

    @property
    def axes(self) -> int:
        """Number of stacked leading axes (layer, expert) of the parameter."""
        return self.name.count("{")

    def hf_name(self, index: tuple[int, ...]) -> str:
        """Return the tensor's name for one layer and expert."""
        return self.name.format(**dict(zip("ie", index, strict=False)))

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one tensor, from the shape of our parameter."""
        own = ours[self.axes :]
        return own[::-1] if self.transposed else own


LAYER = "model.layers.{i}."
ATTENTION = tuple(f"self_attn.{p}_proj" for p in "qkvo")
MLP = tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
EXPERTS = tuple(f"mlp.experts.{p}_proj" for p in ("gate", "up", "down"))
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)

# Every weight of any family; a model has those whose path is among its parameters.
TABLE = (
    Weight(("embed_tokens",), "model.embed_tokens.weight"),
    *(Weight(("layers", *n.split("."), "scale"), f"{LAYER}{n}.weight") for n in NORMS),
    *(
        Weight(("layers", *name.split("."), "kernel"), f"{LAYER}{name}.weight", transposed=True)
        for name in (*ATTENTION, *MLP, "mlp.gate")
    ),
    *(
        Weight(("layers", *name.split("."), "bias"), f"{LAYER}{name}.bias")
        for name in (*ATTENTION, *MLP)
    ),
    *(
        Weight(
            ("layers", *name.split(".")),
            f"{LAYER}{name.replace('experts', 'experts.{e}')}.weight",
            transposed=True,
        )
        for name in EXPERTS
    ),
    Weight(("norm", "scale"), "model.norm.weight"),
    Weight(("lm_head",), "lm_head.weight"),
)


def weights(
    config: DecoderConfig, vocab_size: int
) -> Iterator[tuple[Weight, jax.ShapeDtypeStruct]]:
    """Return the rows of the table that a model has, with shape and dtype of our parameter."""
    shapes = LanguageModel(config, vocab_size).shapes()
    known = {flat(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    rows = [row for row in TABLE if row.path in known]
    missing = known.keys() - {row.path for row in rows}
    assert not missing, f"parameters that TABLE does not name: {missing}"
    return ((row, known[row.path]) for row in rows)


def flat(path: tuple) -> Path:
    """Return a leaf's path of `jax.tree` as a tuple of names."""
    return tuple(str(key.key) for key in path)


def indices(row: Weight, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the indices (layer, expert) of a stacked parameter, layer by layer."""
    return itertools.product(*(range(n) for n in shape[: row.axes]))


def hf_shapes(config: DecoderConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of the exported model, in the order of the files."""
    return {
        row.hf_name(index): row.shape(ours.shape)
        for row, ours in weights(config, vocab_size)
        for index in indices(row, ours.shape)
    }


def hf_tensors(
    params: Params, config: DecoderConfig, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and tensor of the exported model, one at a time on the host.

    `dtype` None keeps the parameters' dtype; quantised kernels become float32.
    """
    named = jax.tree.leaves_with_path(params, is_leaf=is_quantized)
    leaves = {flat(path): leaf for path, leaf in named}
    for row, ours in weights(config, len(params["embed_tokens"])):
        leaf = leaves[row.path]
        for index in indices(row, ours.shape):
            own = leaf[index] if index else leaf
            tensor = np.asarray(dequantize(own) if isinstance(own, Quantized) else own)
            tensor = tensor.T if row.transposed else tensor
            tensor = tensor.astype(jnp.dtype(dtype)) if dtype is not None else tensor
            yield row.hf_name(index), np.ascontiguousarray(tensor)
