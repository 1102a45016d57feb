"""Names, shapes and tensors of a model in Hugging Face's form, by the table of `models.weights`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.quantized import Quantized, dequantize, is_quantized
from fireopd_jax.models.weights import TABLE, Weight, flat, indices


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
