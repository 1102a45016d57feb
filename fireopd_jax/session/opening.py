"""Models by name, for commands that use one: a run's, a folder's or the hub's.

a run, a folder or a hub's name -> ModelSpec, parameters, chat template arguments
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Sharding

from fireopd_jax.config import UserError
from fireopd_jax.models.hf_load import resolve
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.session.finished import open_model, own_template_kwargs
from fireopd_jax.session.parameters import load_or_make
from fireopd_jax.session.specs import ModelSpec, load_spec
from fireopd_jax.text.chat_templates import with_template


def open_any(
    model: str,
    name: str,
    dtype: Literal["float32", "bfloat16"] | None,
    place: Sharding,
    ignore_config_keys: Sequence[str] = (),
    chat_template: str | None = None,
) -> tuple[ModelSpec, Params, Mapping[str, Any]]:
    """Return spec, parameters and template arguments of a model of a run, folder or the hub.

    The model of a run writes prompts as in the run, unless another `chat_template` is chosen.
    `ignore_config_keys` are keys of a folder's config.json; a run has its own in its config.yaml.
    """
    folder = Path(model)
    if (folder / "models").is_dir() or (folder / "config.yaml").is_file():
        if ignore_config_keys:
            raise UserError(f"--ignore-config-keys: {model} is a run, its config.yaml has them")
        spec, params = open_model(folder, name, dtype, place)
        kwargs = {} if chat_template else own_template_kwargs(folder, name)
        return _in_template(spec, chat_template), params, kwargs
    if folder.is_dir() and not any((folder / f).is_file() for f in ("model.json", "config.json")):
        raise UserError(
            f"{folder}: no finished model; expected the folder of a run that has trained, or one "
            "with a model.json or a config.json"
        )
    folder = resolve(model)
    keys = tuple(ignore_config_keys)
    config = ModelConfig(path=str(folder), dtype=dtype, ignore_config_keys=keys)
    spec = load_spec("model", folder, config)
    return _in_template(spec, chat_template), load_or_make(spec, place), {}


def _in_template(spec: ModelSpec, chosen: str | None) -> ModelSpec:
    return dataclasses.replace(spec, tokenizer=with_template(spec.tokenizer, chosen, "model"))
