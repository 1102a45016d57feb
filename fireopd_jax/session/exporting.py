"""Export of a run's model to a Hugging Face folder: a finished model, or a checkpoint.

    runs/x/models/NAME, or runs/x/checkpoints/N -> parameters, tokenizer -> a Hugging Face folder

The run's folder is only read, so the run may still be in progress.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from fireopd_jax.config import UserError, nearest
from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.models.hf_config import hf_config_json
from fireopd_jax.models.hf_export import MAX_SHARD_BYTES, check_target, export_model
from fireopd_jax.models.hf_load import resolve
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.recipe.layers import read_file
from fireopd_jax.recipe.models import StudentConfig
from fireopd_jax.runs.checkpoints import restore_step_params, saved_steps
from fireopd_jax.runtime import files
from fireopd_jax.session.finished import open_model, run_config
from fireopd_jax.session.parameters import abstract_params, load_or_make, placed
from fireopd_jax.session.specs import ModelSpec, load_spec


def export_run(
    run: Path,
    to: Path,
    *,
    model: str = "student",
    step: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a finished model of a run, or its checkpoint after `step` steps, to the folder `to`.

    Raises UserError for an unknown model or step, or a folder `to` that is not empty.
    """
    check_target(to)
    spec, params = open_model(run, model) if step is None else at_step(run, model, step)
    export(to, spec, params, run, step=step, dtype=dtype, max_shard_bytes=max_shard_bytes)


def check_exportable(spec: ModelSpec) -> None:
    """Raise UserError for an architecture that cannot be exported; checked before training."""
    hf_config_json(spec.model.config, spec.model.vocab_size)


def export(
    to: Path,
    spec: ModelSpec,
    params: Params,
    run: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model of a run as a Hugging Face folder, with a model card."""
    export_model(
        to,
        params,
        spec.model.config,
        spec.tokenizer,
        stop=spec.stop,
        card=model_card(to.name, spec, params, run, step),
        generation=spec.generation,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def at_step(run: Path, model: str, step: int) -> tuple[ModelSpec, Params]:
    """Return the student, or a control, as saved in its checkpoint of `step`.

    Raises UserError where there are no checkpoints of the model, or none of that step.
    """
    homes = {"student": run} | {home.name: home for home in sorted((run / "controls").glob("*"))}
    if model not in homes:
        raise UserError(
            f"{run}: no checkpoints of {model!r}{nearest(model, homes)}; it has those of "
            f"{', '.join(homes)}"
        )
    checkpoints = homes[model] / "checkpoints"
    start = run / "models" / "student_start"
    known = saved_steps(checkpoints)
    if step not in known:
        there = f"there are {', '.join(map(str, known))}" if known else "there is none"
        raise UserError(f"{checkpoints}: no checkpoint of step {step}; {there}")
    settings = StudentConfig(path=str(start))
    if not (start / "model.json").is_file():  # read from where the student's path led
        settings = run_config(run).student
    spec = load_spec(model, resolve(str(settings.path)), settings)
    place = SingleDeviceSharding(jax.devices()[0])
    shapes = abstract_params(spec.model, place)
    settings = recorded(run)[0].get("student", {}).get("lora")
    if settings is None:
        return spec, restore_step_params(checkpoints, step, shapes)
    lora = LoraConfig(**settings)
    adapters = placed(jax.eval_shape(lora.init, jax.random.key(0), shapes), place)
    trained = restore_step_params(checkpoints, step, adapters)
    return spec, jax.jit(lora.merge)(load_or_make(spec, place), trained)


def model_card(name: str, spec: ModelSpec, params: Params, run: Path, step: int | None) -> str:
    """Return the model card: origin, method, figures, and how to load the model."""
    config, figures = recorded(run)
    method = config.get("method", {})
    stages = [method.get(key, {}).get("kind") for key in ("filter", "reweight", "loss")]
    steps = config.get("run", {}).get("steps") if step is None else step
    before = {"student": f"after {steps} steps", "student_start": "before any step"}
    when = before.get(spec.name, f"after {steps} steps" if step is not None else "at its end")
    kept = [f"| {key} | {value} |" for key, value in figures.items()]
    table = ["", "| on held-out problems | |", "| --- | --- |", *kept] if kept else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [on-policy-distillation, fireopd-jax]",
        "---",
        "",
        f"# {name}",
        "",
        f"`{spec.name}` of the run `{run.name}` of fireopd-jax, {when}: "
        f"{parameter_count(params):,} parameters, {spec.model.config.model_type}.",
        "",
        f"- method: {', '.join(filter(None, stages)) or 'unknown'}",
        f"- teachers: {', '.join(config.get('teachers', {})) or 'none'}",
        f"- data: {sources_of(config.get('data', {}))}",
        f"- seed: {config.get('run', {}).get('seed', 'unknown')}",
        *(table if step is None and spec.name == "student" else []),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def recorded(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's configuration, and its student's figures; {} where not written yet."""
    config, summary = run / "config.yaml", run / "summary.json"
    tree = read_file(config).tree if config.is_file() else {}
    figures = files.recorded(summary) if summary.is_file() else {}
    return tree, figures.get("student_after", {})


def sources_of(data: Mapping[str, Any]) -> str:
    """Return the paths of a run's rows, of the section `data` of its configuration."""
    paths = [source.get("path", "unknown") for source in data.get("mixture") or [data]]
    return ", ".join(path if isinstance(path, str) else ", ".join(path) for path in paths)
