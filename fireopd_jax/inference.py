"""Use the models of a run: grade one again, or let it answer prompts from a file.

    runs/x/models/NAME -> parameters, tokenizer -> responses -> JSON lines

A run folder is whole in itself: all its models are read from its own `models/`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.build import ModelSpec, check_divisible, load_spec, make_generate, set_up
from fireopd_jax.checkpoint import restore_params
from fireopd_jax.compilation import compile_cache
from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.pipeline import encode, eval_prompts
from fireopd_jax.data.sources import read_rows
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe import Config, ModelConfig, load_config
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling, stream
from fireopd_jax.session import grade
from fireopd_jax.sharding import place_rows, place_whole
from fireopd_jax.text.chat import decode
from fireopd_jax.tracking import progress

PROMPT_STEP = 16
"""Prompts are padded to a multiple of it, so that files of like prompts share their programs."""


def open_model(run: Path, name: str) -> tuple[ModelSpec, Params]:
    """Read a model of a run."""
    models = run / "models"
    known = sorted(path.parent.name for path in models.glob("*/model.json"))
    if not known:
        raise UserError(f"{run}: no finished model; expected the folder of a run that has trained")
    if name not in known:
        raise UserError(
            f"{run}: no model {name!r}{nearest(name, known)}; it has {', '.join(known)}"
        )
    spec = load_spec(name, models / name, ModelConfig(path=str(models / name)))
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
    check_divisible({"eval.batch_size": config.eval.batch_size}, setup.mesh)
    slugs = [spec.slug for spec in setup.teachers]
    spec, indices = setup.student, setup.held_out
    if name in slugs:
        index = slugs.index(name)
        spec, indices = setup.teachers[index], setup.own_rows(indices, index)
    params = place_whole(setup.mesh, params)
    draw = make_generate(setup, spec)
    samples = config.eval.samples
    batches = -(-len(indices) * samples // config.eval.batch_size)
    with progress(f"eval {name}", batches) as bar:
        result = grade(
            setup,
            spec,
            lambda prompts, sampling: draw(
                params, place_rows(setup.mesh, prompts), sampling, jnp.int32(0)
            ),
            indices,
            samples,
            bar,
        )
    return result.summary()


def generate_to_file(
    run: Path,
    model: str,
    prompts: Path,
    out: Path,
    *,
    max_tokens: int,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
) -> None:
    """Answer each prompt of a file `samples` times, in order; `out` appears when it is whole.

    Prompts are rendered as this model read them in the run; the column is `prompt`.
    """
    if out.exists():
        raise UserError(f"{out} exists; expected a new file, nothing is overwritten")
    spec, params = open_model(run, model)
    compile_cache()
    whole = run_config(run)
    template_kwargs = own_template_kwargs(whole, model)
    config = dataclasses.replace(
        whole.data,
        path=str(prompts),
        prompt_column="prompt",
        answer_column=None,
        reference_column=None,
        teacher_column=None,
        max_prompt_tokens=2**20,
    )
    rows = read_rows(config)
    encoded = encode(
        rows,
        tokenizer=spec.tokenizer,
        teacher_tokenizers=[spec.tokenizer],
        template_kwargs=template_kwargs,
        teacher_template_kwargs=[template_kwargs],
        route=np.zeros(len(rows), np.int32),
        config=config,
        max_reference_tokens=max_tokens,
    )
    longest = max(map(len, encoded.prompts))
    width = -(-longest // PROMPT_STEP) * PROMPT_STEP
    encoded = dataclasses.replace(encoded, max_prompt_tokens=width)
    sampling = Sampling.of(
        spec.stop,
        max_tokens,
        stream(seed, "generate"),
        temperature=temperature,
        top_p=top_p,
    )
    draw = jax.jit(
        lambda params, batch, sampling: generate(
            spec.model, params, batch, sampling, jnp.int32(0), max_tokens=max_tokens
        )
    )
    batches = eval_prompts(encoded, np.arange(len(rows)), samples, batch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".writing-{out.name}")
    try:
        with beside.open("w", encoding="utf-8") as file, progress("generate", len(batches)) as bar:
            for batch in batches:
                rollout = jax.device_get(draw(params, batch, sampling))
                for i in np.flatnonzero(batch.row >= 0):
                    record = _record(spec, rows[int(batch.row[i])].prompt, rollout, int(i))
                    file.write(json.dumps(record) + "\n")
                bar(1)
        out.hardlink_to(beside)  # fails, where a rename would overwrite a file made meanwhile
    finally:
        beside.unlink(missing_ok=True)


def own_template_kwargs(config: Config, model: str) -> dict[str, Any]:
    """Give the template arguments that a model of the run was used with."""
    for name, teacher in config.teachers.items():
        if model == f"teacher_{name.replace(' ', '_')}":
            return teacher.chat_template_kwargs
    return config.student.chat_template_kwargs


def _record(spec: ModelSpec, prompt: Sequence[Any], rollout: Any, i: int) -> dict[str, Any]:
    real = rollout.mask[i]
    ids = rollout.tokens[i][real].tolist()
    return {
        "prompt": prompt[0]["content"] if len(prompt) == 1 else list(prompt),
        "text": decode(spec.tokenizer, ids),
        "token_ids": ids,
        "logprobs": rollout.logprob[i][real].tolist(),
        "finish": "stop" if rollout.finished[i] else "length",
    }
