"""Use the models of a run: open one, or grade it again.

    runs/x/models/NAME -> parameters, tokenizer

A run folder is whole in itself: all its models are read from its own `models/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.schema import Config, ModelConfig, load_config
from fireopd_jax.runs.checkpoints import restore_params
from fireopd_jax.runs.tracking import progress
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.session.fits import check_cache, check_divisible
from fireopd_jax.session.session import grade, make_generate
from fireopd_jax.session.setup import ModelSpec, load_spec, set_up
from fireopd_jax.sharding.mesh import replicate, shard_rows


def open_model(
    run: Path, name: str, dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[ModelSpec, Params]:
    """Read a model of a run; `dtype` is the computation's, by default as it was."""
    models = run / "models"
    known = sorted(path.parent.name for path in models.glob("*/model.json"))
    if not known:
        raise UserError(f"{run}: no finished model; expected the folder of a run that has trained")
    if name not in known:
        raise UserError(
            f"{run}: no model {name!r}{nearest(name, known)}; it has {', '.join(known)}"
        )
    spec = load_spec(name, models / name, ModelConfig(path=str(models / name), dtype=dtype))
    like = jax.jit(spec.model.init)(jax.random.key(0))
    return spec, restore_params(models / name, like)


def run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a run, its models replaced by those in its own folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: no config.yaml; expected the folder of a run")
    config = load_config([str(file)])
    paths = [f"student.path={run / 'models' / 'student_start'}"]
    paths += [
        f"teachers.{name}.path={run / 'models' / f'teacher_{name}'}" for name in config.teachers
    ]
    return load_config([str(file), *paths, *overrides])


def evaluate_model(run: Path, name: str, overrides: Sequence[str]) -> dict[str, float | int]:
    """Grade a model on the run's held-out problems; only `eval` keys may be overridden."""
    for override in overrides:
        if not override.startswith("eval."):
            raise UserError(f"{override}: only eval.* keys may be overridden here")
    _, params = open_model(run, name)
    held_out = run_config(run).eval.problems
    config = run_config(run, overrides)
    if not 0 < config.eval.problems <= held_out:
        raise UserError(
            f"eval.problems={config.eval.problems}: the run has held out {held_out} problems; the "
            "others were trained on"
        )
    compile_cache()
    setup = set_up(config)
    check_divisible({"eval.batch_size": config.eval_batch_size}, setup.mesh)
    slugs = [spec.slug for spec in setup.teachers]
    spec, indices = setup.student, setup.held_out
    if name in slugs:
        index = slugs.index(name)
        spec, indices = setup.teachers[index], setup.own_rows(indices, index)
    check_cache(config, setup.mesh, {name: spec.model.config})
    params = replicate(setup.mesh, params)
    draw = make_generate(setup, spec)
    samples = config.eval.samples
    batches = -(-len(indices) * samples // config.eval_batch_size)
    with progress(f"eval {name}", batches) as bar:
        result = grade(
            setup,
            spec,
            lambda prompts, sampling: draw(
                params, shard_rows(setup.mesh, prompts), sampling, jnp.int32(0)
            ),
            indices,
            samples,
            bar,
        )
    return result.summary()


def own_template_kwargs(config: Config, model: str) -> dict[str, Any]:
    """Give the template arguments that a model of the run was used with."""
    for name, teacher in config.teachers.items():
        if model == f"teacher_{name.replace(' ', '_')}":
            return teacher.chat_template_kwargs
    return config.student.chat_template_kwargs
