"""The finished models of a run: load one, or grade it.

runs/x/models/NAME, or the folder that a frozen model was loaded from -> parameters, tokenizer
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.identity import check_rows, located, recorded_rows
from fireopd_jax.evaluation.evaluator import EvalResult
from fireopd_jax.evaluation.responses import Graded
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.models import ModelConfig, TeacherConfig
from fireopd_jax.recipe.schema import Config, load_config
from fireopd_jax.runs.finding import no_run
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.session.fits import check_cache, check_divisible
from fireopd_jax.session.identity import (
    SOURCES,
    START,
    TEMPLATES,
    recorded_sources,
    recorded_templates,
)
from fireopd_jax.session.parameters import load_or_make, load_own
from fireopd_jax.session.session import grade, make_generate
from fireopd_jax.session.setup import set_up
from fireopd_jax.session.specs import Model, ModelSpec, load_spec, slug
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.working import LONG_S, working
from fireopd_jax.text.clock import stopped_kwargs

ROWS = ("data.path=", "data.mixture=")
"""Overrides that say where a run's rows are now."""


def model_folders(run: Path) -> dict[str, Path]:
    """Return the folder of each model of a run by name: in the run, or where a frozen one is."""
    own = {path.parent.name: path.parent for path in (run / "models").glob("*/model.json")}
    sources = recorded_sources(run / SOURCES)
    read = {slug(name): Path(source["folder"]) for name, source in sources.items()}
    return dict(sorted((read | own).items()))


def find_model(run: Path, name: str) -> tuple[str, Path]:
    """Return folder name and folder of a model of a run: "teacher_a b" is in "teacher_a%20b".

    Raises UserError, which lists the run's models, for an unknown name.
    """
    folders = model_folders(run)
    if not folders:
        raise no_run(run)
    role, _, rest = name.partition("_")
    found = name if name in folders or not rest else slug(f"{role} {rest}")
    if found not in folders:
        raise UserError(
            f"{run}: no model {name!r}{nearest(name, folders)}; it has {', '.join(folders)}"
        )
    return found, folders[found]


def open_model(
    run: Path,
    name: str,
    dtype: Literal["float32", "bfloat16"] | None = None,
    place: Sharding | None = None,
) -> tuple[ModelSpec, Params]:
    """Return a model of a run and its parameters.

    `dtype` is the dtype of the computation, by default that of the run; `place` is the sharding of
    the parameters, by default the first device. Raises UserError for an unknown name.
    """
    found, folder = find_model(run, name)
    frozen = _frozen(run, found)
    settings = ModelConfig(
        path=str(folder),
        dtype=dtype,
        chat_template=frozen.chat_template,
        ignore_config_keys=frozen.ignore_config_keys,
    )
    quantize = frozen.quantize if isinstance(frozen, TeacherConfig) else None
    spec = load_spec(name, folder, settings).quantized(quantize)
    with working(f"loading {name} of {run}", after=LONG_S):
        return spec, load_or_make(spec, place or SingleDeviceSharding(jax.devices()[0]))


def _frozen(run: Path, found: str) -> ModelConfig:
    """Return the settings of a frozen model of the run; the defaults for one saved in the run."""
    file = run / "config.yaml"
    if not file.is_file() or (run / "models" / found / "model.json").is_file():
        return ModelConfig()
    config = load_config([str(file)])
    models: dict[str, ModelConfig] = {f"teacher {n}": each for n, each in config.teachers.items()}
    models |= {} if config.base is None else {"base": config.base}
    if found == slug(START):
        return _as_written(run, "student", config.student)
    name = next((name for name in models if slug(name) == found), None)
    return ModelConfig() if name is None else _as_written(run, name, models[name])


def _as_written(run: Path, name: str, model: Model) -> Model:
    """Return a model's configuration as it wrote prompts in a run, for use at any time and place.

    A chosen chat template is given as its text, and the clock of a template is stopped.
    """
    written = recorded_templates(run / TEMPLATES)
    template = written.templates.get(name)
    kwargs = stopped_kwargs(template, model.chat_template_kwargs, written.moment)
    chosen = model.chat_template if template is None else template
    return dataclasses.replace(
        model,
        chat_template_kwargs=dict(kwargs),
        chat_template=None if model.chat_template is None else chosen,
    )


def run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a run, with the paths of its rows and finished models filled in.

    Raises UserError where the folder has no config.yaml.
    """
    file = run / "config.yaml"
    if not file.is_file():
        if not run.is_dir():
            raise no_run(run)
        raise UserError(f"{run}: no config.yaml; expected the folder of a run")
    config = load_config([str(file), *overrides])
    recorded = recorded_rows(run)
    if config.data.mixture and any(each.startswith("data.path=") for each in overrides):
        raise UserError("data.path: the run reads a mixture; expected data.mixture=[...]")
    if recorded is not None and not any(each.startswith(ROWS) for each in overrides):
        data = located(config.data, Path(recorded["folder"]))
        config = dataclasses.replace(config, data=data)
    folders = model_folders(run)

    def read(name: str, model: Model, found: str | None = None) -> Model:
        model = _as_written(run, name, model)
        folder = folders.get(found or slug(name))
        if folder is None:  # not made yet
            return model
        keys = () if (folder / "model.json").is_file() else model.ignore_config_keys
        return dataclasses.replace(
            model,
            path=str(folder),
            sft=None,
            architecture=DecoderConfig(),
            ignore_config_keys=keys,
        )

    return dataclasses.replace(
        config,
        student=read("student", config.student, "student_start"),
        teachers={name: read(f"teacher {name}", each) for name, each in config.teachers.items()},
        # Only training needs these.
        base=None,
        eval=dataclasses.replace(config.eval, sets={}),
    )


def evaluate_model(run: Path, name: str, overrides: Sequence[str]) -> dict[str, float | int]:
    """Return the figures of a model on the run's held-out problems, see `EvalResult.summary`."""
    graded, samples = held_out_responses(run, name, overrides)
    return EvalResult.of(graded, samples).summary()


def held_out_responses(run: Path, name: str, overrides: Sequence[str]) -> tuple[list[Graded], int]:
    """Return a model's graded responses to the run's held-out problems, and their number of each.

    Raises UserError for overrides of other keys than `eval.*` and `data.path`, for other rows than
    the run's, or without held-out problems.
    """
    for override in overrides:
        if not override.startswith(("eval.", *ROWS)):
            raise UserError(
                f"{override}: only eval.* keys, data.path and data.mixture may be overridden here"
            )
    found, folder = find_model(run, name)
    own = run_config(run)
    held_out = own.eval.problems
    if held_out is None:
        held_out = set_up(own).config.eval.problems
    if not held_out:
        raise UserError(
            f"{run}: no held-out problems (eval.problems=0), all rows were trained on; "
            "expected a run with eval.problems of 1 or more"
        )
    config = run_config(run, overrides)
    asked = config.eval.problems
    if asked is not None and not 0 < asked <= held_out:
        raise UserError(
            f"eval.problems={asked}: expected 1 to {held_out}, the run's held-out "
            "problems; the others were trained on"
        )
    compile_cache()
    setup = set_up(config)
    if (recorded := recorded_rows(run)) is not None:
        check_rows(setup.rows, recorded, run)
    check_divisible({"eval.batch_size": config.eval_batch_size}, setup.mesh)
    place = Placement(setup.mesh)
    slugs = [spec.slug for spec in setup.teachers]
    if found in slugs:
        index = slugs.index(found)
        spec = setup.teachers[index]
        indices, params = setup.own_rows(setup.held_out, index), load_or_make(spec, place)
    else:
        spec, indices = setup.student, setup.held_out
        own_files = (folder / "model.json").is_file()
        with working(f"loading {name}", after=LONG_S):
            params = load_own(folder, spec, place) if own_files else load_or_make(spec, place)
    check_cache(config, setup.mesh, {name: spec.model.config})
    draw = make_generate(setup, spec)
    samples = config.eval.samples
    batches = -(-len(indices) * samples // config.eval_batch_size)
    with progress(f"eval {name}", batches) as bar:
        graded = grade(
            setup,
            spec,
            lambda prompts, sampling: draw(
                params, shard_rows(setup.mesh, prompts), sampling, jnp.int32(0)
            ),
            indices,
            samples,
            bar,
        )
    return graded, samples


def own_template_kwargs(run: Path, name: str) -> dict[str, Any]:
    """Return the chat template arguments of a model of a run."""
    base = load_config([str(run / "config.yaml")]).base
    if name == "base" and base is not None:
        return _as_written(run, "base", base).chat_template_kwargs
    config = run_config(run)
    for teacher, settings in config.teachers.items():
        if name in (f"teacher_{teacher}", slug(f"teacher {teacher}")):
            return settings.chat_template_kwargs
    return config.student.chat_template_kwargs
