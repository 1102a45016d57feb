"""The whole configuration: its sections, and loading from files and overrides.

    a.yaml b.yaml key=value ... -> layers -> Config, checked

Each section is defined in the module that it configures, or in a module of this package.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from fireopd_jax.config import (
    Origins,
    UserError,
    config,
    dotted,
    idle_keys,
    origin_of,
    validate,
)
from fireopd_jax.data.sources import DataConfig
from fireopd_jax.evaluation.settings import EvalConfig
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.recipe.checks import conflicts, sft_conflicts
from fireopd_jax.recipe.hints import wrong_value
from fireopd_jax.recipe.keys import check_layers
from fireopd_jax.recipe.layers import Layer, find_config, overlay, read_file, read_layers
from fireopd_jax.recipe.models import ModelConfig, StudentConfig, TeacherConfig
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.run import RunConfig
from fireopd_jax.rollout.settings import RolloutConfig
from fireopd_jax.sharding.mesh import MeshConfig
from fireopd_jax.text.checks import ChecksConfig
from fireopd_jax.text.templates import Leak

MEANS = ("micro_batch_tokens", "micro_batch_size", "head", "head_chunk")
"""Keys of `method.score` that do not change the scores: a control keeps the run's values."""


RATE = ("optim", "learning_rate")
LORA_RATE, LOW_LORA_RATE = 1e-4, 1e-5
"""Learning rate of adapters by default, and the one below which a warning is shown. Adapters need
about ten times the rate of all parameters, or more (arXiv 2405.09673)."""


@config
class Config:
    """The configuration of a run."""

    run: RunConfig = RunConfig()
    """Folder, length, seed, checkpoints and reports of the run."""
    data: DataConfig = DataConfig()
    """Data set of prompts."""
    student: StudentConfig = StudentConfig()
    """The model that is trained."""
    teachers: dict[str, TeacherConfig] = dataclasses.field(default_factory=dict)
    """The teachers by name; `teacher.x` is short for `teachers.default.x`."""
    base: ModelConfig | None = None
    """Base policy of a loss with extrapolation; null: the student at its start."""
    method: MethodConfig = MethodConfig()
    """Scoring, filter, reweighting and loss."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling of responses."""
    optim: OptimConfig = OptimConfig()
    """The student's optimizer."""
    eval: EvalConfig = EvalConfig()
    """Evaluation of models."""
    checks: ChecksConfig = ChecksConfig()
    """Allowed differences between the student and its teachers."""
    mesh: MeshConfig = MeshConfig()
    """Axes of the device mesh."""

    @property
    def eval_batch_size(self) -> int:
        """Responses sampled at a time in an evaluation."""
        return self.eval.batch_size or self.rollout.batch_size


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A configuration, with notes for its user."""

    config: Config
    notes: tuple[str, ...]
    """The files it was loaded from, and a warning for each key without effect."""


def load_config(arguments: Sequence[str]) -> Config:
    """Return the configuration of files and overrides merged over the defaults, checked.

    Raises UserError, in one line, for the first error.
    """
    return load(arguments).config


def load(arguments: Sequence[str]) -> Loaded:
    """Return the same as `load_config`, with notes on the files and on keys without effect."""
    loaded, layers, origins = _read(arguments)
    check(loaded)
    notes = *_sources(layers, loaded), *_of_rate(loaded, layers, origins)
    return Loaded(loaded, (*notes, *_warnings(loaded, origins)))


def load_sections(arguments: Sequence[str]) -> Config:
    """Return the same as `load_config` without the checks between sections, such as for a teacher.

    For commands that use a part of the configuration. Raises UserError for the first error.
    """
    return _read(arguments)[0]


def _read(arguments: Sequence[str]) -> tuple[Config, list[Layer], Origins]:
    """Return the configuration with each section valid, its layers, and the origins of its keys."""
    _, layers = check_layers(read_layers(arguments))
    tree = as_tree(Config())
    origins: Origins = {}
    for layer in layers:
        # A section whose lines are all comments is null: it changes nothing.
        given = {k: v for k, v in layer.tree.items() if v is not None or tree.get(k) is None}
        tree = overlay(tree, given)
        origins = origins | layer.origins
    if not _in_epochs(layers) and isinstance(tree["run"], Mapping):
        tree = overlay(tree, {"run": {"epochs": None}})
    if _adapts(tree) and not _sets_rate(layers):
        tree["optim"]["learning_rate"] = LORA_RATE
    # Drop the keys of sections that a later `kind` or `path` has replaced.
    origins = {key: where for key, where in origins.items() if _stands(tree, key)}
    return validate(Config, tree, origins, wrong_value), layers, origins


def _in_epochs(layers: Sequence[Layer]) -> bool:
    """Return whether the length of the run is its `epochs`: the last layer with a length counts.

    Raises UserError for a layer with both lengths.
    """
    counted = False
    for layer in layers:
        run = layer.tree.get("run")
        given = [key for key in ("steps", "epochs") if isinstance(run, Mapping) and run.get(key)]
        if len(given) == 2:
            where = origin_of(("run", "epochs"), layer.origins)
            raise UserError(f"{where}: run.steps and run.epochs are both lengths; give one of them")
        counted = given == ["epochs"] if given else counted
    return counted


def with_method(config: Config, name: str) -> Config:
    """Return the configuration with the method file `name` merged over it: a control of the run.

    A method file names all of its choices with their kinds, so that the control's method is that
    of the file alone, but for the keys in `MEANS`.
    """
    layer = read_file(find_config(f"method/{name}"))
    check_layers([layer])
    control = validate(Config, overlay(as_tree(config), layer.tree), layer.origins)
    means = {key: getattr(config.method.score, key) for key in MEANS}
    score = dataclasses.replace(control.method.score, **means)
    return dataclasses.replace(control, method=dataclasses.replace(control.method, score=score))


def methods(config: Config) -> list[MethodConfig]:
    """Return the method of the run and those of its controls."""
    return [config.method, *(with_method(config, name).method for name in config.run.compare)]


def used_teachers(config: Config) -> dict[str, TeacherConfig]:
    """Return the teachers by name if anything uses them: a method, or the student's training."""
    sft = config.student.sft
    copied = sft is not None and sft.source == "teacher"
    if copied or any(method.teacher.resident for method in methods(config)):
        return config.teachers
    return {}


def as_tree(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data, every default written out."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def check(config: Config) -> None:
    """Raise UserError for the first conflict between sections, in the run or in a control."""
    for problem in (*conflicts(config), *sft_conflicts(config)):
        raise UserError(problem)
    for name in config.run.compare:
        control = with_method(config, name)
        if control.method == config.method:
            raise UserError(
                f"run.compare: {name} is the method of the run itself; remove it (run.compare=[])"
            )
        if dataclasses.replace(control, method=config.method) != config:
            raise UserError(
                f"run.compare: {name} sets keys outside method, which a control ignores; expected "
                "a separate run"
            )
        for problem in conflicts(control):
            raise UserError(f"run.compare: {name}: {problem}")


def _adapts(tree: Any) -> bool:
    """Return whether the student's adapters are trained; the tree need not be valid yet."""
    student = tree.get("student")
    return (
        isinstance(student, dict)
        and student.get("lora") is not None
        and isinstance(tree.get("optim"), dict)
    )


def _sets_rate(layers: Sequence[Layer]) -> bool:
    """Return whether a layer gives the student's learning rate."""
    return any("learning_rate" in (layer.tree.get("optim") or ()) for layer in layers)


def _of_rate(config: Config, layers: Sequence[Layer], origins: Origins) -> Iterator[str]:
    """Yield a line for the learning rate of adapters: chosen here, or low."""
    if config.student.lora is None:
        return
    rate = config.optim.learning_rate
    if not _sets_rate(layers):
        yield f"note: optim.learning_rate={rate:g}, for adapters (student.lora)"
    elif rate < LOW_LORA_RATE:
        yield (
            f"warning: {origin_of(RATE, origins)}: optim.learning_rate={rate:g} is low for "
            f"adapters (student.lora), which need ten times the usual rate; the default "
            f"is {LORA_RATE:g}"
        )


def _stands(tree: Any, key: Sequence[str]) -> bool:
    """Return whether the tree has the key."""
    for part in key:
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _sources(layers: Sequence[Layer], config: Config) -> Iterator[str]:
    names = [layer.name for layer in layers]
    names += [str(find_config(f"method/{name}")) for name in config.run.compare]
    if names:
        yield f"configuration: {', '.join(dict.fromkeys(names))}"


def _warnings(config: Config, origins: Origins) -> Iterator[str]:
    """Yield a line for each key that the user has set and that has no effect."""
    if config.teachers and not used_teachers(config):
        kind = config.method.teacher.kind
        yield f"note: teachers are not loaded: none is used with method.teacher.kind={kind}"
    method = config.method
    told = method.teacher.leak != Leak() and method.teacher.kind != "none"
    if told and not method.privileged:
        yield "warning: method.teacher.leak has no effect: the method quotes no solution"
    for key, reason in idle_keys(config):
        if own := [each for each in origins if each[: len(key)] == key]:
            where = origin_of(own[0], origins)
            yield f"warning: {where}: {dotted(key)} has no effect {reason}"
