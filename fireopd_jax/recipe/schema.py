"""The whole configuration, and what must hold between its sections.

    run data student teachers method rollout optim eval mesh -> Config -> check

Each section stands beside what it configures; here they only meet.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter

from fireopd_jax.config import (
    Origins,
    UserError,
    config,
    find_config,
    lay,
    read_yaml,
    resolve,
)
from fireopd_jax.config import validate as validate_tree
from fireopd_jax.data.sources import DataConfig
from fireopd_jax.evaluation.evaluator import EvalConfig
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.filtering import AllOf, TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL, SampledSquare
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence
from fireopd_jax.method.losses.vocabulary import MiniLLM
from fireopd_jax.method.reweighting import ConfidenceConfusion
from fireopd_jax.method.scoring import TopK, WholeVocabulary
from fireopd_jax.models.decoder import DecoderConfig
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.models.quantized import Quantize
from fireopd_jax.recipe.optim import OptimConfig, SftConfig
from fireopd_jax.recipe.run import RunConfig
from fireopd_jax.rollout.settings import RolloutConfig
from fireopd_jax.sharding.mesh import MeshConfig
from fireopd_jax.text.checks import ChecksConfig


@config
class ModelConfig:
    """A model: embedded, or read from a folder; with or without supervised training first."""

    path: str | None = None
    """A folder of Hugging Face, a name on its hub, or a model of a run: `runs/x/models/student`."""
    architecture: DecoderConfig = DecoderConfig()
    """Architecture of an embedded model, which starts from random parameters; beside `path`, what
    the folder must hold."""
    tokenizer: str = "builtin:bytes"
    """Tokenizer of an embedded model: `builtin:bytes`, or a Hugging Face folder."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation with a model from `path`; by default as the folder says."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the parameters from `path`; by default float32, of a frozen teacher `dtype`."""
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of this model's chat template, such as `{enable_thinking: false}`."""
    sft: SftConfig | None = None
    """Supervised training before distillation; null is none."""


@config
class StudentConfig(ModelConfig):
    """The model that learns."""

    lora: LoraConfig | None = None
    """Low-rank adapters learn, the model stays as it is after `sft`; null: all of it learns."""


@config
class TeacherConfig(ModelConfig):
    """A teacher: frozen while the student learns."""

    quantize: Quantize | None = None
    """Keep the kernels of its layers in eight bits, after `sft` if any; null: in their type."""
    eos_alias: bool = False
    """It ends responses with another token than the student: what it says of its own end is taken
    for what it says of the student's."""


@config
class Config:
    """Everything that a run is a function of."""

    run: RunConfig = RunConfig()
    """Name, length, seed and record of the run."""
    data: DataConfig = DataConfig()
    """Where the prompts come from."""
    student: StudentConfig = StudentConfig()
    """The model that learns."""
    teachers: dict[str, TeacherConfig] = dataclasses.field(default_factory=dict)
    """The models that score, by name; `teacher.x` is short for `teachers.default.x`."""
    base: ModelConfig | None = None
    """The base policy of a method that extrapolates; null: the student as it begins."""
    method: MethodConfig = MethodConfig()
    """How the student learns."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are drawn."""
    optim: OptimConfig = OptimConfig()
    """The student's optimizer."""
    eval: EvalConfig = EvalConfig()
    """How models are evaluated."""
    checks: ChecksConfig = ChecksConfig()
    """What may differ between the student and its teachers."""
    mesh: MeshConfig = MeshConfig()
    """How devices are used."""

    @property
    def eval_batch_size(self) -> int:
        """Give the responses that an evaluation draws at a time."""
        return self.eval.batch_size or self.rollout.batch_size


ALIASES = {
    # TRL
    "model_name_or_path": "student.path",
    "teacher_model_name_or_path": "teacher.path",
    "dataset_name": "data.path",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "optim.micro_batch_size",
    "gradient_accumulation_steps": "optim.micro_batch_size",
    "max_steps": "run.steps",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "rollout.max_tokens",
    "num_generations": "rollout.group_size",
    "max_grad_norm": "optim.clip_norm",
    "lr_scheduler_type": "optim.schedule",
    "logging_steps": "run.log_every",
    "eval_steps": "eval.every",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "resume_from_checkpoint": "run.resume",
    "chat_template_kwargs": "student.chat_template_kwargs",
    # verl and the FiRe-OPD scripts
    "max_response_length": "rollout.max_tokens",
    "train_batch_size": "rollout.batch_size",
    "ppo_micro_batch_size_per_gpu": "optim.micro_batch_size",
    "lr": "optim.learning_rate",
    "clip_ratio": "method.loss.clip",
    "test_freq": "eval.every",
    "save_freq": "run.save_every",
    "resume_mode": "run.resume",
    "traj_skip_percentile": "method.filter.drop_fraction",
    "entropy_alpha": "method.reweight.alpha",
    "entropy_beta": "method.reweight.beta",
    "opd_teacher": "data.teacher_column",
    "rollout_is_threshold": "method.loss.importance_cap",
    "lmbda": "rollout.on_policy_fraction",
}


def load_config(arguments: Sequence[str]) -> Config:
    """Read files and overrides, lay them over the defaults, and check the whole."""
    config, origins = resolve(Config, arguments, ALIASES)
    overruled = check(config, origins)
    return _without(config, overruled) if overruled else config


def with_method(config: Config, name: str) -> Config:
    """Lay the method file `name` over a configuration, as a control of the same run."""
    layer, origins = read_yaml(find_config(f"method/{name}"))
    return validate_tree(Config, lay(as_tree(config), layer), origins)


def methods(config: Config) -> list[MethodConfig]:
    """List the method of the run and those of its controls."""
    return [config.method, *(with_method(config, name).method for name in config.run.compare)]


def as_tree(config: Config) -> dict[str, Any]:
    """Give the configuration as plain data, every default written out."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def check(config: Config, origins: Origins) -> list[str]:
    """Refuse sections that do not fit together, and keys that would have no effect.

    Returns the keys of one layer that a later layer has turned off: whoever does so need not take
    them back.
    """
    for problem in _conflicts(config):
        raise UserError(problem)
    for name in config.run.compare:
        control = with_method(config, name)
        if control.method == config.method:
            raise UserError(
                f"run.compare: {name} is the method of the run itself; take it out (run.compare=[])"
            )
        if dataclasses.replace(control, method=config.method) != config:
            raise UserError(
                f"run.compare: {name} sets more than a method, which the run's other parts would "
                "not follow; expected a run of its own"
            )
        for problem in _conflicts(control):
            raise UserError(f"run.compare: {name}: {problem}")
    order, overruled = list(origins), []
    for key, switch, reason in _ineffective(config):
        if key not in origins or _without(config, [key]) == config:
            continue
        layers = {origins[k].rpartition(":")[0] for k in (key, switch) if k in origins}
        if len(layers) == 1 or order.index(key) > order.index(switch):
            raise UserError(f"{origins[key]}: {key} has no effect {reason}")
        overruled.append(key)
    return list(dict.fromkeys(overruled))  # two switches may turn one key off


def _without(config: Config, keys: Sequence[str]) -> Config:
    """Give these keys their defaults back."""
    tree = as_tree(config)
    for key in keys:
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section[part]
        del section[name]
    return validate_tree(Config, tree, {})


def _conflicts(config: Config) -> Iterator[str]:
    method, rollout = config.method, config.rollout
    if not config.teachers:
        yield "teachers: none is given; expected `teacher: ...` or `teachers: {NAME: ...}`"
    for stage in method.readers:
        if missing := sorted(stage.needs - method.score.gives):
            yield (
                f"method: {stage.kind} needs {', '.join(missing)}, which "
                f"method.score ({method.score.kind}) does not give"
            )
    for key, size, divisor in _divisions(config):
        if size % divisor:
            yield f"{key}={divisor} does not divide the {size} rows of a batch"
    if rollout.temperature == 0:
        yield "rollout.temperature=0: greedy rollouts have no gradient; expected a positive value"
    yield from conflicts(method, rollout, len(config.teachers))
    if isinstance(method.filter, TeacherQuantile) and method.filter.scope == "batch":
        rho = method.filter.drop_fraction
        rows = rollout.batch_size * (1 + method.filter.window)
        if rho == 1:
            yield "method.filter.drop_fraction=1: every trajectory is dropped, nothing is learnt"
        elif rho > 0 and int(rho * rows + 1e-9) == 0:
            yield (
                f"method.filter.drop_fraction={rho} of {rows} rows drops none: expected 0, or at "
                f"least {1 / rows:.3g}, or a larger rollout.batch_size"
            )
    for key, optim, updates in _optimizers(config):
        if optim.warmup_steps >= updates:
            yield f"{key}.warmup_steps={optim.warmup_steps}: there are only {updates} updates"
    if len(set(config.run.compare)) < len(config.run.compare):
        yield f"run.compare={list(config.run.compare)}: a method is named twice"
    if len(config.teachers) > 1 and config.data.teacher_column is None:
        yield (
            f"data.teacher_column: with {len(config.teachers)} teachers, expected the column that "
            "names each row's teacher"
        )
    for name, teacher in config.teachers.items():
        if teacher.sft is not None and teacher.sft.source == "teacher":
            yield f"teachers.{name}.sft.source: a teacher learns from rows; expected 'rows'"


def conflicts(method: MethodConfig, rollout: RolloutConfig, num_teachers: int) -> Iterator[str]:
    """Refuse stages that this score or these rollouts make wrong, vain, or identically zero."""
    score, loss = method.score, method.loss
    filtered = rollout.top_p < 1 or max(rollout.top_k, rollout.min_p, rollout.min_tokens) > 0
    sampled = isinstance(loss, SampledReverseKL | SampledSquare)
    if filtered and sampled and loss.importance_cap is None:
        yield (
            f"{loss.kind} is exact only for unfiltered rollouts: with rollout.top_p, "
            "top_k, min_p or min_tokens set, give method.loss.importance_cap too"
        )
    few = loss if isinstance(loss, SupportDivergence) else None
    tail = few is not None and few.head == "tail_sample"
    if filtered and (tail or isinstance(loss, EntropyAware | MiniLLM)):
        yield (
            f"{loss.kind} takes the rollout's tokens for draws of the student itself: expected "
            "rollout.top_p=1, top_k=0, min_p=0 and min_tokens=0"
        )
    own = sampled or tail or isinstance(loss, EntropyAware | MiniLLM)
    if rollout.on_policy_fraction < 1 and own:
        yield (
            f"rollout.on_policy_fraction={rollout.on_policy_fraction}: {loss.kind} takes every "
            "response for the student's own; expected 1, or a divergence on a support or over the "
            "vocabulary"
        )
    filters = method.filter.filters if isinstance(method.filter, AllOf) else (method.filter,)
    if sum(isinstance(each, TeacherQuantile) and each.window > 0 for each in filters) > 1:
        yield (
            "method.filter.filters: two rank by earlier batches (window), of which one memory is "
            "kept; expected one"
        )
    if score.margin is not None and rollout.group_size == 1:
        yield (
            "method.score.margin compares the responses of a prompt: expected rollout.group_size "
            "of 2 or more, it is 1"
        )
    if score.margin is not None and not method.needs & {"margin"}:
        yield (
            "method.score.margin: neither filter nor loss reads it; expected null, or "
            "method.loss.margin=true"
        )
    if few is not None and tail and few.divergence.kind != "reverse_kl":
        yield (
            f"method.loss.divergence={few.divergence.kind}: head=tail_sample estimates the "
            "reverse KL only; expected reverse_kl, or head=tail_bucket"
        )
    lone = False
    if isinstance(score, TopK):
        lone = score.k == 1 and score.support != "union" and not score.sampled
    if lone and few is not None and few.head == "renormalised":
        yield (
            "method.score.k=1: one word renormalised has probability 1 in both models, the loss is "
            "identically zero; expected k of 2 or more, or score.sampled=true"
        )
    if isinstance(score, WholeVocabulary) and not method.needs & {"teacher.hidden", "reverse_kl"}:
        yield (
            "method.score: whole_vocabulary keeps the teacher's hidden states, which neither "
            "filter, reweight nor loss reads; expected sampled_token or top_k"
        )
    if isinstance(score, WholeVocabulary) and num_teachers > 1:
        yield (
            f"method.score: whole_vocabulary reads one teacher's head, {num_teachers} "
            "teachers are given; expected one, or score.kind=top_k"
        )


def _divisions(config: Config) -> Iterator[tuple[str, int, int]]:
    rows = config.rollout.batch_size
    yield "rollout.group_size", rows, config.rollout.group_size
    yield "optim.micro_batch_size", rows, config.optim.micro_batch_size or 1
    yield "method.score.micro_batch_size", rows, config.method.score.micro_batch_size or 1
    for key, model in _models(config):
        if model.sft is not None:
            micro = model.sft.optim.micro_batch_size or 1
            yield f"{key}.sft.optim.micro_batch_size", model.sft.batch_size, micro


def _models(config: Config) -> Iterator[tuple[str, ModelConfig]]:
    yield "student", config.student
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}", teacher


def _optimizers(config: Config) -> Iterator[tuple[str, OptimConfig, int]]:
    """List the optimizers with the number of their updates."""
    yield "optim", config.optim, config.run.steps * config.run.updates_per_rollout
    for key, model in _models(config):
        if model.sft is not None:
            yield f"{key}.sft.optim", model.sft.optim, model.sft.steps


def _float32(config: Config) -> Iterator[tuple[str, str]]:
    """List the optimizers whose parameters are surely float32, each with the key that says so."""
    for key, model in _models(config):
        switch = f"{key}.architecture.param_dtype" if model.path is None else f"{key}.param_dtype"
        dtype = model.architecture.param_dtype if model.path is None else model.param_dtype
        if dtype == "float32":
            yield f"{key}.sft.optim", switch
            if model is config.student and config.student.lora is None:
                yield "optim", switch
    if config.student.lora is not None:
        yield "optim", "student.lora"


def _ineffective(config: Config) -> Iterator[tuple[str, str, str]]:
    """List keys that are never read, each with the key that decides so and the reason."""
    if config.run.updates_per_rollout == 1:
        switch = "run.updates_per_rollout"
        yield "method.loss.clip", switch, "with run.updates_per_rollout=1: the ratio is 1"
    if len(config.teachers) == 1:
        filter, reweight = config.method.filter, config.method.reweight
        alone = "as 'teacher' with a single teacher"
        if isinstance(filter, TeacherQuantile) and filter.scope == "teacher":
            yield "method.filter.scope", "teachers", alone
        if isinstance(reweight, ConfidenceConfusion) and reweight.max_scope == "teacher":
            yield "method.reweight.max_scope", "teachers", alone
    if config.run.dir is not None:
        yield "run.name", "run.dir", "beside run.dir"
    else:
        yield "run.resume", "run.dir", "without run.dir: a run by name is always new"
    if isinstance(config.method.loss, SampledReverseKL):
        floor, ceiling = config.method.loss.floor, config.method.loss.ceiling
        if floor is not None and ceiling is not None and floor >= ceiling:
            yield "method.loss.floor", "method.loss.ceiling", "with a ceiling that is no higher"
    if "base.logprob" not in config.method.needs:
        yield "method.score.base", "method.loss", "with stages that need no base.logprob"
    if config.base is not None and not any(method.score.base for method in methods(config)):
        for field in dataclasses.fields(ModelConfig):
            reason = "with a score that asks no base policy"
            yield f"base.{field.name}", "method.score.base", reason
    reweight = config.method.reweight
    if isinstance(reweight, ConfidenceConfusion) and reweight.alpha == reweight.beta == 0:
        for name in ("max_scope", "max_quantile"):
            yield f"method.reweight.{name}", "method.reweight.alpha", "with alpha = beta = 0"
    if isinstance(reweight, ConfidenceConfusion) and reweight.max_scope == "vocabulary":
        reason = "with max_scope: vocabulary, whose bound is log V"
        yield "method.reweight.max_quantile", "method.reweight.max_scope", reason
    if config.eval.temperature == 0:
        yield "eval.top_p", "eval.temperature", "with eval.temperature=0, which is greedy"
    stages = [model.sft for _, model in _models(config) if model.sft is not None]
    learnt = any(stage.source == "rows" for stage in stages)
    if not learnt and config.rollout.on_policy_fraction == 1:
        reason = "without supervised training on rows, and with rollouts all on-policy"
        yield "data.reference_column", "student.sft", reason
    for key, model in _models(config):
        if model.sft is not None and model.sft.source == "rows":
            yield f"{key}.sft.teacher_rows", f"{key}.sft.source", "with source: rows"
        if model.path is not None:
            path = f"{key}.path"
            yield f"{key}.tokenizer", path, f"beside {key}.path: the folder names its tokenizer"
            for name in ("dtype", "param_dtype"):
                reason = f"beside {key}.path: expected {key}.{name}"
                yield f"{key}.architecture.{name}", path, reason
        else:
            for name in ("dtype", "param_dtype"):
                reason = f"without {key}.path: expected {key}.architecture.{name}"
                yield f"{key}.{name}", f"{key}.path", reason
    for key, switch in _float32(config):
        yield f"{key}.master", switch, "with parameters in float32"
    for key, optim, _ in _optimizers(config):
        if optim.schedule == "constant":
            yield f"{key}.final_fraction", f"{key}.schedule", "with schedule: constant"
    if not config.eval.every:
        yield "eval.every_problems", "eval.every", "with eval.every=0"
        yield "run.keep_best", "eval.every", "with eval.every=0: no step is graded"
    if not config.eval.problems:
        # The teachers' answers for supervised training come in batches of this size, too.
        answering = config.student.sft is not None and config.student.sft.source == "teacher"
        for field in dataclasses.fields(EvalConfig):
            if field.name != "problems" and not (answering and field.name == "batch_size"):
                yield f"eval.{field.name}", "eval.problems", "with eval.problems=0"
