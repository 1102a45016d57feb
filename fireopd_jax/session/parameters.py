"""Sources of parameters: a run's folder, a Hugging Face folder, or random initialisation.

ModelSpec -> shapes (nothing allocated) -> load_or_make -> parameters on the mesh
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from fireopd_jax.models.hf_load import load, resolve
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runs.checkpoints import restore_params
from fireopd_jax.session.specs import ModelSpec


def placed(shapes: Any, place: Sharding) -> Any:
    """Return abstract arrays with the shapes and dtypes of a tree, and this sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )


def abstract_params(model: LanguageModel, place: Sharding) -> Params:
    """Return shapes, dtypes and sharding of a model's parameters; nothing is allocated."""
    return placed(jax.eval_shape(model.init, jax.random.key(0)), place)


def load_or_make(spec: ModelSpec, place: Sharding, seed: int = 0) -> Params:
    """Return a model's initial parameters: loaded from its `path`, or random.

    Kernels are quantised according to `spec.model.quantize`. Random parameters are a function of
    `seed`, the run's seed, and the model's name.
    """
    model = spec.model
    if spec.config.path is None:
        key = jax.random.key(seed_for(seed, f"init {spec.name}"), impl="threefry2x32")
        return jax.jit(model.init, out_shardings=place)(key)
    folder = resolve(spec.config.path)
    if not (folder / "model.json").is_file():
        return load(folder, model.config, model.vocab_size, place, model.quantize)
    return load_own(folder, spec, place)


def load_own(folder: Path, spec: ModelSpec, place: Sharding) -> Params:
    """Return parameters saved by a run, quantised according to the spec."""
    stored = dataclasses.replace(spec.model, quantize=spec.stored)
    params = restore_params(folder, abstract_params(stored, place))
    return quantized(spec, params, place) if spec.stored is None else params


def quantized(spec: ModelSpec, params: Params, place: Sharding) -> Params:
    """Return the parameters with kernels quantised according to the spec."""
    if spec.model.quantize is None:
        return params
    return jax.jit(quantize_params, out_shardings=place)(params)
