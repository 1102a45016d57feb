"""From a configuration to what a run works with: rows, tokens and models without parameters.

    Config -> Setup (rows, tokenizers, models, mesh)

Nothing here compiles, trains or writes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import Encoded, encode, split
from fireopd_jax.data.sources import Row, read_rows, route
from fireopd_jax.method.filtering import AllOf, SpecialTokens
from fireopd_jax.method.scoring import TopK
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.hf_config import check_same
from fireopd_jax.models.hf_load import read_config, resolve
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.quantized import Quantize
from fireopd_jax.recipe.schema import (
    Config,
    MethodConfig,
    ModelConfig,
    StudentConfig,
    TeacherConfig,
    methods,
)
from fireopd_jax.rollout.sampling import Sampling, seed_for
from fireopd_jax.sharding.mesh import make_mesh
from fireopd_jax.text.chat import stop_ids
from fireopd_jax.text.checks import TokenizerFacts, check_ids, check_teacher, valid_rows
from fireopd_jax.text.tokenizer import load_tokenizer, read_generation


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without parameters, and the tokenizer it speaks."""

    name: str
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    config: ModelConfig
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What its `generation_config.json` says, if it has one."""
    stored: Quantize | None = None
    """What the folder that it is read from keeps the kernels in, where it is one of a run."""

    @property
    def stop(self) -> tuple[int, ...]:
        """The ids that end a response, its usual one first."""
        return stop_ids(self.tokenizer, self.generation)

    @property
    def tokenizer_facts(self) -> TokenizerFacts:
        """What `check_teacher` compares."""
        kwargs = self.config.chat_template_kwargs
        return TokenizerFacts(self.name, self.tokenizer, self.tokenizer_name, self.stop, kwargs)

    def limited(self, size: int) -> "ModelSpec":
        """Let the model say no id from `size` on."""
        if size >= self.model.size:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, valid=size))

    def quantized(self, how: Quantize | None) -> "ModelSpec":
        """Let the model keep its kernels in `how`; None: as they come."""
        model = dataclasses.replace(self.model, quantize=how or self.model.quantize)
        return dataclasses.replace(self, model=model)

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return self.name.replace(" ", "_")

    def description(self) -> dict[str, Any]:
        """Say all that is needed to load the parameters again."""
        return {
            "architecture": dataclasses.asdict(self.model.config),
            "vocab_size": self.model.vocab_size,
            "tokenizer": self.tokenizer_name if self.builtin_tokenizer else "tokenizer",
            "generation": dict(self.generation),
            "quantize": self.model.quantize,
        }

    def scoring(self, student: "ModelSpec") -> LanguageModel:
        """Give the model as it scores a student, whose end may stand for its own."""
        if not (isinstance(self.config, TeacherConfig) and self.config.eos_alias):
            return self.model
        return dataclasses.replace(self.model, exchange=(student.stop[0], self.stop[0]))

    @property
    def builtin_tokenizer(self) -> bool:
        """Whether the tokenizer needs no files; others are saved beside the parameters."""
        return self.tokenizer_name.startswith("builtin:")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the stages of a run share."""

    config: Config
    mesh: Mesh
    student: ModelSpec
    teachers: tuple[ModelSpec, ...]
    base: ModelSpec | None
    """The base policy, where another than the student as it begins is named."""
    rows: Sequence[Row]
    encoded: Encoded
    train: np.ndarray
    held_out: np.ndarray

    def own_rows(self, indices: np.ndarray, teacher: int) -> np.ndarray:
        """Pick the rows that are routed to one teacher."""
        return indices[self.encoded.route[indices] == teacher]

    def sampling(
        self,
        purpose: str,
        *,
        temperature: float,
        spec: ModelSpec | None = None,
        **filters: float | int,
    ) -> Sampling:
        """Give the sampler's knobs with the seed of one purpose; by default the student's."""
        return Sampling.of(
            (spec or self.student).stop,
            self.config.rollout.max_tokens,
            seed_for(self.config.run.seed, purpose),
            temperature=temperature,
            top_p=filters.get("top_p", 1.0),
            top_k=int(filters.get("top_k", 0)),
            min_p=filters.get("min_p", 0.0),
            min_tokens=int(filters.get("min_tokens", 0)),
        )


def make_spec(name: str, config: ModelConfig) -> ModelSpec:
    """Describe an embedded model, or one of a folder or the hub."""
    if config.path is not None:
        return load_spec(name, resolve(config.path), config)
    tokenizer = load_tokenizer(config.tokenizer)
    size = config.architecture.vocab_size or len(tokenizer)
    model = LanguageModel(config.architecture, size, valid_rows(tokenizer, size, name))
    return ModelSpec(name, model, tokenizer, config.tokenizer, config)


def load_spec(name: str, folder: Path, config: ModelConfig) -> ModelSpec:
    """Read the description of a model that a run has saved, or of one of Hugging Face."""
    file = folder / "model.json"
    if not file.is_file():
        return _hugging_face(name, folder, config)
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        architecture, size = DecoderConfig(**said["architecture"]), said["vocab_size"]
        tokenizer, generation = said["tokenizer"], said.get("generation", {})
        stored = said.get("quantize")
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: {file} does not describe a model of ours: {reason}") from error
    if not tokenizer.startswith("builtin:"):
        tokenizer = str(folder / tokenizer)
    _check_stated(name, config, architecture, size, file)
    architecture = _typed(architecture, config, architecture.param_dtype)
    loaded = load_tokenizer(tokenizer)
    model = LanguageModel(architecture, size, valid_rows(loaded, size, name), quantize=stored)
    return ModelSpec(name, model, loaded, tokenizer, config, generation, stored)


def _hugging_face(name: str, folder: Path, config: ModelConfig) -> ModelSpec:
    """Read the description of a model in Hugging Face's format."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: {folder} holds neither model.json nor config.json; expected a model that a "
            "run has saved, such as runs/NAME/models/student, or one of Hugging Face"
        )
    architecture = read_config(folder)
    _check_stated(name, config, architecture, architecture.vocab_size, folder / "config.json")
    # What learns is kept in float32; a frozen model is read in the type that it computes in.
    wholly = isinstance(config, StudentConfig) and config.lora is None
    learns = config.sft is not None or wholly
    frozen = config.dtype or architecture.dtype
    architecture = _typed(architecture, config, "float32" if learns else frozen)
    assert architecture.vocab_size is not None
    loaded = load_tokenizer(str(folder))
    valid = valid_rows(loaded, architecture.vocab_size, name)
    model = LanguageModel(architecture, architecture.vocab_size, valid)
    return ModelSpec(name, model, loaded, str(folder), config, read_generation(folder))


def _check_stated(
    name: str, config: ModelConfig, found: DecoderConfig, vocab_size: int | None, file: Path
) -> None:
    """Hold an architecture that stands beside a path against the folder's."""
    if config.path is not None and config.architecture != DecoderConfig():
        found = dataclasses.replace(found, vocab_size=vocab_size)
        check_same(config.architecture, found, name, str(file))


def _typed(
    architecture: DecoderConfig, config: ModelConfig, param_dtype: Literal["float32", "bfloat16"]
) -> DecoderConfig:
    return dataclasses.replace(
        architecture,
        dtype=config.dtype or architecture.dtype,
        param_dtype=config.param_dtype or param_dtype,
    )


def set_up(config: Config) -> Setup:
    """Read the data and describe the models."""
    mesh = make_mesh(config.mesh)
    student = make_spec("student", config.student)
    teachers = tuple(
        make_spec(f"teacher {name}", teacher).quantized(teacher.quantize)
        for name, teacher in config.teachers.items()
    )
    base = None if config.base is None else make_spec("base", config.base)
    others = teachers if base is None else (*teachers, base)
    for other in others:
        check_teacher(
            student.tokenizer_facts,
            other.tokenizer_facts,
            config.checks.allow,
            aliased(student, other),
        )
    for spec in (student, *others):
        check_length(spec, config)
    # What a teacher has no token for, it cannot score.
    student = student.limited(min(other.model.size for other in others))
    rows = read_rows(config.data)
    routes = route(rows, list(config.teachers), config.data.teacher_column)
    for index, name in enumerate(config.teachers):
        if not (routes == index).any():
            raise UserError(f"teachers.{name}: no row is routed to it; take it out, or see data")
    encoded = encode(
        rows,
        tokenizer=student.tokenizer,
        template_kwargs=config.student.chat_template_kwargs,
        teacher_tokenizers=[teacher.tokenizer for teacher in teachers],
        teacher_template_kwargs=[t.chat_template_kwargs for t in config.teachers.values()],
        route=routes,
        config=config.data,
        max_reference_tokens=config.rollout.max_tokens,
    )
    check_rows(student, teachers, encoded)
    for method in methods(config):
        check_support(method, student)
        special_ids(method.filter, student.tokenizer)
    kept = encoded.kept
    train, held_out = (kept[side] for side in split([rows[i] for i in kept], config.eval.problems))
    for index in held_out:
        if rows[index].answer is None:
            raise UserError(
                f"{rows[index].origin}: no answer to grade by; name its column as "
                "data.answer_column, or set eval.problems=0"
            )
    if any(method.score.margin is not None for method in methods(config)):
        for index in train:
            if rows[index].answer is None:
                raise UserError(
                    f"{rows[index].origin}: no answer to grade by, which method.score.margin needs"
                )
    return Setup(config, mesh, student, teachers, base, rows, encoded, train, held_out)


def aliased(student: ModelSpec, other: ModelSpec) -> bool:
    """Tell whether a teacher's end stands for the student's; refuse it where both are one."""
    alias = isinstance(other.config, TeacherConfig) and other.config.eos_alias
    if alias and student.stop[0] == other.stop[0]:
        raise UserError(f"{other.name}: eos_alias has no effect, it ends as the student does")
    return alias


def check_support(method: MethodConfig, student: ModelSpec) -> None:
    """Refuse a list longer than the vocabulary."""
    score, size = method.score, student.model.size
    if isinstance(score, TopK) and score.k > size:
        raise UserError(f"method.score.k={score.k}: the vocabulary has {size} words")


def special_ids(filter: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Turn the texts that a filter names into all the ids that they are made of."""
    ids: set[int] = set()
    filters = filter.filters if isinstance(filter, AllOf) else (filter,)
    for text in (
        text for each in filters if isinstance(each, SpecialTokens) for text in each.strings
    ):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not found:
            raise UserError(f"method.filter.strings: {text!r} is no token of the student's")
        ids.update(found)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tuple(sorted(ids))


def check_rows(student: ModelSpec, teachers: Sequence[ModelSpec], encoded: Encoded) -> None:
    """Refuse rows with ids that a model has no row for."""
    check_ids("student: a prompt", encoded.prompts, student.model.vocab_size)
    check_ids("student: a reference", encoded.references, student.model.size)
    for index, teacher in enumerate(teachers):
        own = (encoded.teacher_prompts[row] for row in np.flatnonzero(encoded.route == index))
        check_ids(f"{teacher.name}: a prompt", own, teacher.model.vocab_size)


def check_length(spec: ModelSpec, config: Config) -> None:
    """Refuse texts longer than the model is made for: its positions mean nothing there."""
    room, limit = config.data.max_prompt_tokens, spec.model.config.max_position_embeddings
    longest = room + config.rollout.max_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"{spec.name}: data.max_prompt_tokens={room} and "
            f"rollout.max_tokens={config.rollout.max_tokens} make {longest} tokens, the model is "
            f"made for {limit} (max_position_embeddings)"
        )
