"""Use the models of a finished run: grade one again, or let it answer prompts from a file.

runs/x/models/NAME -> parameters, tokenizer -> responses -> JSON lines
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.build import ModelSpec, load_spec, make_generate, set_up
from fireopd_jax.checkpoint import restore_params
from fireopd_jax.compilation import compile_cache
from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.pipeline import encode, eval_prompts
from fireopd_jax.data.sources import DataConfig, read_rows
from fireopd_jax.evaluation.evaluator import evaluate
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe import StudentConfig, load_config
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling, stream
from fireopd_jax.sharding import place_rows, place_whole
from fireopd_jax.text.chat import decode, stop_ids
from fireopd_jax.tracking import progress


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
    spec = load_spec(name, models / name, StudentConfig(path=str(models / name)))
    like = jax.jit(spec.model.init)(jax.random.key(0))
    return spec, restore_params(models / name, like)


def evaluate_model(run: Path, name: str, overrides: Sequence[str]) -> dict[str, float | int]:
    """Grade a model on the run's held-out problems; only `eval` keys may be overridden."""
    for override in overrides:
        if not override.startswith("eval."):
            raise UserError(f"{override}: only eval.* keys may be overridden here")
    spec, params = open_model(run, name)
    compile_cache()
    setup = set_up(load_config([str(run / "config.yaml"), *overrides]))
    config = setup.config.eval
    if not config.problems:
        raise UserError("eval.problems=0: nothing to grade on")
    batches = eval_prompts(setup.encoded, setup.held_out, config.samples, config.batch_size)
    sampling = setup.sampling("eval", temperature=config.temperature, top_p=config.top_p)
    draw, params = make_generate(setup, spec), place_whole(setup.mesh, params)
    with progress(f"eval {name}", len(batches)) as bar:
        result = evaluate(
            lambda prompts: draw(params, place_rows(setup.mesh, prompts), sampling, jnp.int32(0)),
            batches,
            lambda ids: decode(spec.tokenizer, ids.tolist()),
            lambda row: setup.rows[row].answer or "",
            config.samples,
            advance=bar,
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
    """Answer each prompt of a file `samples` times, in order; `out` appears when it is whole."""
    if out.exists():
        raise UserError(f"{out} exists; expected a new file, nothing is overwritten")
    spec, params = open_model(run, model)
    compile_cache()
    config = DataConfig(path=str(prompts))
    rows = read_rows(config)
    encoded = encode(
        rows,
        tokenizer=spec.tokenizer,
        teacher_tokenizers=[spec.tokenizer],
        teacher_template_kwargs=[config.chat_template_kwargs],
        route=np.zeros(len(rows), np.int32),
        config=config,
        max_reference_tokens=max_tokens,
    )
    if encoded.dropped_prompts:
        raise UserError(
            f"{prompts}: {encoded.dropped_prompts} prompts are longer than "
            f"{config.max_prompt_tokens} tokens"
        )
    sampling = Sampling.of(
        stop_ids(spec.tokenizer), max_tokens, stream(seed, "generate"),
        temperature=temperature, top_p=top_p,
    )  # fmt: skip
    draw = jax.jit(
        lambda params, batch: generate(
            spec.model, params, batch, sampling, jnp.int32(0), max_tokens=max_tokens
        )
    )
    batches = eval_prompts(encoded, np.arange(len(rows)), samples, batch_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".writing-{out.name}")
    with beside.open("w", encoding="utf-8") as file, progress("generate", len(batches)) as bar:
        for batch in batches:
            rollout = jax.device_get(draw(params, batch))
            for i in np.flatnonzero(batch.row >= 0):
                record = _record(spec, rows[int(batch.row[i])].prompt, rollout, int(i))
                file.write(json.dumps(record) + "\n")
            bar(1)
    beside.rename(out)


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
