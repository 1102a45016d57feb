"""Models without parameters, described by a configuration, a run's folder or Hugging Face.

ModelConfig -> ModelSpec (architecture, tokenizer, stop ids)
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError, dotted
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.hf_config import check_same
from fireopd_jax.models.hf_forms import IgnoredKeys
from fireopd_jax.models.hf_load import read_config, resolve
from fireopd_jax.models.hf_weights import refuse_adapters
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.quantized import Quantize
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.runtime.limits import read_json
from fireopd_jax.runtime.target import platform
from fireopd_jax.text.chat import stop_ids
from fireopd_jax.text.chat_templates import with_template
from fireopd_jax.text.checks import TokenizerFacts, valid_rows
from fireopd_jax.text.clock import stopped_kwargs
from fireopd_jax.text.tokenizer import load_tokenizer, read_generation

Model = TypeVar("Model", bound=ModelConfig)


def slug(name: str) -> str:
    """Return the folder name of a model; distinct names have distinct folders.

    "teacher openai/gsm8k" is "teacher_openai%2Fgsm8k".
    """
    role, space, rest = name.partition(" ")
    return role if not space else f"{role}_{quote(rest, safe='')}"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without parameters, and its tokenizer."""

    name: str
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    config: ModelConfig
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Contents of its `generation_config.json`, if it has one."""
    stored: Quantize | None = None
    """Quantisation of the kernels in the folder of a run that the model is loaded from."""

    @property
    def stop(self) -> tuple[int, ...]:
        """The stop token ids, its EOS first."""
        return stop_ids(self.tokenizer, self.generation, self.model.vocab_size)

    @property
    def facts(self) -> TokenizerFacts:
        """Tokenizer, stop ids and template arguments, which the checks compare."""
        kwargs = self.config.chat_template_kwargs
        return TokenizerFacts(self.name, self.tokenizer, self.tokenizer_name, self.stop, kwargs)

    def stopped_at(self, moment: str | None) -> "ModelSpec":
        """Return the model with the clock of its chat template stopped, unless it already is."""
        return dataclasses.replace(self, config=stopped_at(self.config, self.tokenizer, moment))

    def limited(self, size: int) -> "ModelSpec":
        """Return the model with probability 0 for the token ids from `size` on."""
        if size >= self.model.size:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, valid=size))

    def quantized(self, how: Quantize | None) -> "ModelSpec":
        """Return the model with kernels quantised as `how`; None changes nothing."""
        model = dataclasses.replace(self.model, quantize=how or self.model.quantize)
        return dataclasses.replace(self, model=model)

    @property
    def slug(self) -> str:
        """Name of the model's folder."""
        return slug(self.name)

    @property
    def read_each_time(self) -> bool:
        """Whether the model is frozen: always loaded from `path`, never saved in the run."""
        return self.config.path is not None and self.config.sft is None

    def description(self) -> dict[str, Any]:
        """Return the contents of model.json, with which the parameters can be loaded."""
        return {
            "architecture": dataclasses.asdict(self.model.config),
            "vocab_size": self.model.vocab_size,
            "tokenizer": self.tokenizer_name if self.builtin_tokenizer else "tokenizer",
            "generation": dict(self.generation),
            "quantize": self.model.quantize,
        }

    def scoring(self, student: "ModelSpec") -> LanguageModel:
        """Return the model for scoring the student, with the EOS rows swapped if `eos_alias`."""
        if not self.config.swaps_eos:
            return self.model
        return dataclasses.replace(self.model, exchange=(student.stop[0], self.stop[0]))

    @property
    def builtin_tokenizer(self) -> bool:
        """Whether the tokenizer needs no files; others are saved beside the parameters."""
        return self.tokenizer_name.startswith("builtin:") and self.config.chat_template is None


def stopped_at(config: Model, tokenizer: PreTrainedTokenizerBase, moment: str | None) -> Model:
    """Return a model's configuration with the clock of its chat template stopped at `moment`."""
    kwargs = stopped_kwargs(tokenizer.chat_template, config.chat_template_kwargs, moment)
    return dataclasses.replace(config, chat_template_kwargs=dict(kwargs))


def make_spec(name: str, config: ModelConfig) -> ModelSpec:
    """Return the spec of an embedded model, or of one in a folder or on the hub."""
    if config.path is not None:
        return load_spec(name, resolve(config.path), config)
    tokenizer = with_template(load_tokenizer(config.tokenizer), config.chat_template, name)
    size = config.architecture.vocab_size or len(tokenizer)
    model = LanguageModel(config.architecture, size, valid_rows(tokenizer, size, name))
    return ModelSpec(name, model, tokenizer, config.tokenizer, config)


def load_spec(name: str, folder: Path, config: ModelConfig) -> ModelSpec:
    """Return the spec of a model saved by a run, or of one in Hugging Face's format.

    Raises UserError for a folder that describes no model.
    """
    file = folder / "model.json"
    if not file.is_file():
        return _hugging_face(name, folder, config)
    if config.ignore_config_keys:
        setting = ignored_keys(name, config).setting
        raise UserError(f"{setting}: {folder} is a model of a run, which has no config.json")
    try:
        found = read_json(file)
        architecture, size = DecoderConfig(**found["architecture"]), found["vocab_size"]
        tokenizer, generation = found["tokenizer"], found.get("generation", {})
        stored = found.get("quantize")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: {file} is not a valid model description: {reason}") from error
    if not tokenizer.startswith("builtin:"):
        tokenizer = str(folder / tokenizer)
    _check_stated(name, config, architecture, size, file)
    architecture = _typed(architecture, config, architecture.param_dtype)
    loaded = with_template(load_tokenizer(tokenizer), config.chat_template, name)
    model = LanguageModel(architecture, size, valid_rows(loaded, size, name), quantize=stored)
    return ModelSpec(name, model, loaded, tokenizer, config, generation, stored)


def _hugging_face(name: str, folder: Path, config: ModelConfig) -> ModelSpec:
    """Return the spec of a model in Hugging Face's format."""
    refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: {folder} holds neither model.json nor config.json; expected a model saved by "
            "a run, such as runs/NAME/models/student, or one of Hugging Face"
        )
    architecture = read_config(folder, ignored_keys(name, config))
    _check_stated(name, config, architecture, architecture.vocab_size, folder / "config.json")
    # Trained parameters are float32; those of a frozen model stay as they are, or as computed.
    frozen = config.dtype or architecture.dtype
    architecture = _typed(architecture, config, "float32" if config.trained else frozen)
    assert architecture.vocab_size is not None
    loaded = with_template(load_tokenizer(str(folder)), config.chat_template, name)
    valid = valid_rows(loaded, architecture.vocab_size, name)
    model = LanguageModel(architecture, architecture.vocab_size, valid)
    spec = ModelSpec(name, model, loaded, str(folder), config, read_generation(folder))
    assert spec.stop  # raises for ids outside the vocabulary
    return spec


def ignored_keys(name: str, config: ModelConfig) -> IgnoredKeys:
    """Return the keys of config.json that a model is read without, and where the user gives them.

    Commands that open a folder call its model "model".
    """
    role, _, own = name.partition(" ")
    key = ("teachers", own) if role == "teacher" else (role,)
    setting = "--ignore-config-keys" if role == "model" else dotted((*key, "ignore_config_keys"))
    return IgnoredKeys(config.ignore_config_keys, setting)


def _check_stated(
    name: str, config: ModelConfig, found: DecoderConfig, vocab_size: int | None, file: Path
) -> None:
    """Raise UserError where an architecture given beside a path differs from the folder's."""
    if config.path is not None and config.architecture != DecoderConfig():
        found = dataclasses.replace(found, vocab_size=vocab_size)
        check_same(config.architecture, found, name, str(file))


def _typed(
    architecture: DecoderConfig, config: ModelConfig, param_dtype: Literal["float32", "bfloat16"]
) -> DecoderConfig:
    # XLA on a CPU emulates bfloat16: slower than float32, and less exact.
    dtype = "float32" if platform() == "cpu" else architecture.dtype
    return dataclasses.replace(
        architecture,
        dtype=config.dtype or dtype,
        param_dtype=config.param_dtype or param_dtype,
    )
