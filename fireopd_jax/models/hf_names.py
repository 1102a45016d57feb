"""One table between our parameters and Hugging Face's tensors; loading and export both read it.

    ("layers", "self_attn", "q_proj", "kernel")  <->  model.layers.{i}.self_attn.q_proj.weight, .T

Ours are stacked: leading axes for the layer {i} and the expert {e}, then the matrix. Linear maps
are [inputs, outputs] here and [outputs, inputs] there.
"""

import dataclasses
import functools
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
    """One row of the table."""

    path: Path
    """Where it stands in our parameters."""
    name: str
    """Hugging Face's name, with {i} for the layer and {e} for the expert."""
    transposed: bool = False
    """Whether theirs is our matrix transposed."""

    @property
    def axes(self) -> int:
        """How many leading axes of ours their names count."""
        return self.name.count("{")

    def theirs(self, index: tuple[int, ...]) -> str:
        """Give the name at one layer and expert."""
        return self.name.format(**dict(zip("ie", index, strict=False)))

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of one of their tensors from ours."""
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

# Every weight that any family has; a model has those whose path is among its parameters.
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
    """List the rows of the table that a model has, each with the shape and type of ours."""
    shapes = _shapes(config, vocab_size)
    known = {flat(path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    rows = [row for row in TABLE if row.path in known]
    missing = known.keys() - {row.path for row in rows}
    assert not missing, f"parameters without a name: {missing}"
    return ((row, known[row.path]) for row in rows)


@functools.cache
def _shapes(config: DecoderConfig, vocab_size: int) -> Params:
    return jax.eval_shape(LanguageModel(config, vocab_size).init, jax.random.key(0))


def flat(path: tuple) -> Path:
    """Turn JAX's path of a leaf into names."""
    return tuple(str(key.key) for key in path)


def indices(row: Weight, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """List the layers and experts of a stacked parameter, layer by layer."""
    return itertools.product(*(range(n) for n in shape[: row.axes]))


def hf_shapes(config: DecoderConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Give the name and shape of every tensor of the exported model, in the order of the file."""
    return {
        row.theirs(index): row.shape(ours.shape)
        for row, ours in weights(config, vocab_size)
        for index in indices(row, ours.shape)
    }


def hf_tensors(
    params: Params, config: DecoderConfig, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Give every tensor by its exported name, one at a time on the host; `dtype` None: as kept."""
    named = jax.tree.leaves_with_path(params, is_leaf=is_quantized)
    leaves = {flat(path): leaf for path, leaf in named}
    for row, ours in weights(config, len(params["embed_tokens"])):
        leaf = leaves[row.path]
        for index in indices(row, ours.shape):
            own = leaf[index] if index else leaf
            tensor = np.asarray(dequantize(own) if isinstance(own, Quantized) else own)
            tensor = tensor.T if row.transposed else tensor
            tensor = tensor.astype(jnp.dtype(dtype)) if dtype is not None else tensor
            yield row.theirs(index), np.ascontiguousarray(tensor)
