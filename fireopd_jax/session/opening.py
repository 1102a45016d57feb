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
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.finished import model_folders, open_model, own_template_kwargs
from fireopd_jax.session.parameters import load_or_make
from fireopd_jax.session.specs import ModelSpec, load_spec
from fireopd_jax.terminal.working import LONG_S, working
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
    if is_run(folder):
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
    with working(f"loading {model}", after=LONG_S):
        params = load_or_make(spec, place)
    return _in_template(spec, chat_template), params, {}


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, rather than of a model."""
    return (folder / "models").is_dir() or (folder / "config.yaml").is_file()


def start_of(run: Path) -> tuple[str, str]:
    """Return the student of a run before distillation, as `open_any` takes it: model and name.

    It is in the run, or where the student was loaded from. Raises UserError if it is neither.
    """
    if "student_start" in model_folders(run):
        return str(run), "student_start"
    path = None
    if (run / "config.yaml").is_file():
        student = load_config([str(run / "config.yaml")]).student
        path = student.path if student.sft is None else None
    if path is None:
        raise UserError(f"{run}: no student_start in its models/; has the run trained?")
    return path, "student"


def _in_template(spec: ModelSpec, chosen: str | None) -> ModelSpec:
    return dataclasses.replace(spec, tokenizer=with_template(spec.tokenizer, chosen, "model"))
