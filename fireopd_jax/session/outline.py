"""A configuration that can be planned on a machine without its models and its rows.

Config -> Config with stand-ins, and a note on each

A model that is not here stands as the configuration states its architecture, with random parameters
and the tokenizer of one that is here, else one of bytes; rows that are not here as built-in ones.
Lengths, batches and meshes stay.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from fireopd_jax.config import UserError
from fireopd_jax.data.files import matching
from fireopd_jax.data.settings import DataConfig, Source
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.hf_load import resolve
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.recipe.schema import Config
from fireopd_jax.runtime.target import platform

ROWS = "builtin:addition-2"
Model = TypeVar("Model", bound=ModelConfig)


def outlined(config: Config) -> tuple[Config, list[str]]:
    """Return the configuration with stand-ins for what is not here, and a note on each.

    Raises UserError for a model that is not here and whose architecture is not stated.
    """
    notes: list[str] = []
    models = {"student": config.student, **{f"teachers.{n}": t for n, t in config.teachers.items()}}
    if config.base is not None:
        models["base"] = config.base
    absent = {name for name, model in models.items() if not is_here(model)}

    there = [m for name, m in models.items() if name not in absent and m.path is not None]

    def stand_in(name: str, model: Model) -> Model:
        if name not in absent:
            return model
        if model.architecture == DecoderConfig():
            raise UserError(
                f"{name}.path={model.path}: not on this machine, and {name}.architecture does not "
                "state its shape; give one of them"
            )
        notes.append(f"{name}: {model.path} is not here; planned from {name}.architecture")
        return _random(model, there[0] if there else None)

    student = stand_in("student", config.student)
    teachers = {n: stand_in(f"teachers.{n}", t) for n, t in config.teachers.items()}
    base = None if config.base is None else stand_in("base", config.base)
    data = config.data
    if absent or not _has_rows(data):
        if not _has_rows(data):
            notes.append("data: its rows are not here; of them only the lengths set here count")
        data = _stand_in_rows(data, list(config.teachers))
    # Rows of a hub's data sets are not looked for.
    own = dataclasses.replace(config.eval, sets={})
    changes = {"student": student, "teachers": teachers, "base": base, "data": data, "eval": own}
    return dataclasses.replace(config, **changes), notes


def is_here(model: ModelConfig) -> bool:
    """Return whether a model needs no download: embedded, served, a folder, or cached."""
    if model.path is None or getattr(model, "served", None) is not None:
        return True
    if Path(model.path).expanduser().is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(model.path, "config.json"), str)
    except HFValidationError:
        return False


def _random(model: Model, speaker: ModelConfig | None) -> Model:
    """Return a model with random parameters, of the dtypes that it would have from its path.

    It has the tokenizer and the template of `speaker`, else of bytes.
    """
    spoken: dict[str, Any] = {"chat_template": None, "chat_template_kwargs": {}}
    if speaker is not None and speaker.path is not None:
        spoken = {name: getattr(speaker, name) for name in spoken}
        spoken["tokenizer"] = str(resolve(speaker.path))
    dtype = model.dtype or ("float32" if platform() == "cpu" else "bfloat16")
    frozen = "float32" if model.trained else model.dtype or "bfloat16"
    architecture = dataclasses.replace(
        model.architecture, dtype=dtype, param_dtype=model.param_dtype or frozen
    )
    return dataclasses.replace(
        model, path=None, architecture=architecture, dtype=None, param_dtype=None,
        ignore_config_keys=(), **spoken,
    )  # fmt: skip


def _has_rows(data: DataConfig) -> bool:
    sources = data.mixture or (data,)
    named = [[each.path] if isinstance(each.path, str) else each.path for each in sources]
    return all(
        path.startswith("builtin:") or Path(path).expanduser().exists() or matching(path)
        for paths in named
        for path in paths
    )


def _stand_in_rows(data: DataConfig, teachers: list[str]) -> DataConfig:
    mixture = tuple(Source(path=ROWS, teacher=name) for name in teachers)
    return DataConfig(path=ROWS, mixture=mixture, max_prompt_tokens=data.max_prompt_tokens)
