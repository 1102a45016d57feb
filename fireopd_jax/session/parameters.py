"""Sources of parameters: a run's folder, a Hugging Face folder, or random initialisation.

ModelSpec -> shapes (nothing allocated) -> load_or_make -> parameters on the mesh
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.tree_util import keystr

from fireopd_jax.config import UserError
from fireopd_jax.models.hf_load import load, resolve
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runs.checkpoints import restore_params
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.offload import in_host_memory
from fireopd_jax.types import Array

Place = Sharding | Placement
"""One sharding of all arrays of a tree, or each parameter's own."""


def shardings(tree: Any, place: Place) -> Any:
    """Return the sharding of each array, or shape, of a tree."""
    if isinstance(place, Placement):
        return place.of(tree)
    return jax.tree.map(lambda _: place, tree)


def placed(shapes: Any, place: Place) -> Any:
    """Return abstract arrays with the shapes and dtypes of a tree, and their shardings."""

    def one(leaf: Any, own: Sharding) -> jax.ShapeDtypeStruct:
        # A weak type is part of a program's signature, too.
        weak = getattr(leaf, "weak_type", False)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own, weak_type=weak)

    return jax.tree.map(one, shapes, shardings(shapes, place))


def abstract_params(model: LanguageModel, place: Place) -> Params:
    """Return shapes, dtypes and shardings of a model's parameters; nothing is allocated."""
    return placed(model.shapes(), place)


@functools.lru_cache(maxsize=16)
def random_init(model: LanguageModel, place: Place) -> Callable[[Array], Params]:
    """Return the jitted function from a key to a model's random parameters."""
    return jax.jit(model.init, out_shardings=shardings(model.shapes(), place))


def random_key(spec: ModelSpec, seed: int) -> Array:
    """Return the key of a model's random parameters in a run with this seed."""
    return jax.random.key(seed_for(seed, f"init {spec.name}"), impl="threefry2x32")


def load_or_make(spec: ModelSpec, place: Place, seed: int = 0) -> Params:
    """Return a model's initial parameters: loaded from its `path`, or random.

    Kernels are quantised according to `spec.model.quantize`. Random parameters are a function of
    `seed`, the run's seed, and the model's name.
    """
    model = spec.model
    if spec.config.path is None:
        return random_init(model, place)(random_key(spec, seed))
    folder = resolve(spec.config.path)
    if not (folder / "model.json").is_file():
        stored = dataclasses.replace(model, quantize=None)
        places = shardings(stored.shapes(), place)
        return load(folder, model.config, model.vocab_size, places, model.quantize)
    return load_own(folder, spec, place)


def load_own(folder: Path, spec: ModelSpec, place: Place) -> Params:
    """Return parameters saved by a run, quantised according to the spec."""
    stored = dataclasses.replace(spec.model, quantize=spec.stored)
    params = restore_params(folder, abstract_params(stored, place))
    refuse_nonfinite(folder, params)
    return quantized(spec, params, place) if spec.stored is None else params


def waiting(spec: ModelSpec, params: Params) -> Params:
    """Return the parameters of a frozen model where they wait: on the devices, or offloaded."""
    return in_host_memory(params) if spec.config.offloaded else params


def refuse_nonfinite(folder: Path, params: Params) -> None:
    """Raise UserError, with the first parameter, where one is NaN or infinite."""
    leaves = jax.tree.leaves_with_path(params)
    floats = {
        keystr(path): leaf for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    finite = jax.jit(lambda tree: {name: jnp.isfinite(leaf).all() for name, leaf in tree.items()})
    for name, whole in jax.device_get(finite(floats)).items():
        if not whole:
            raise UserError(
                f"{folder}: {name} is not finite; expected the weights of a model that works"
            )


def quantized(spec: ModelSpec, params: Params, place: Place) -> Params:
    """Return the parameters with kernels quantised according to the spec."""
    if spec.model.quantize is None:
        return params
    places = shardings(jax.eval_shape(quantize_params, params), place)
    return jax.jit(quantize_params, out_shardings=places)(params)
