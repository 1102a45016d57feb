"""Supervised training: the cold start of a student, and how the embedded teachers are made.

    prompts with references -> Batch (every reference token counts once) -> the same update

A reference is treated as a rollout that was drawn elsewhere, so alignment, masks, denominators
and the optimizer step are those of distillation.
"""

from collections.abc import Callable
from math import inf
from pathlib import Path
from statistics import fmean

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.method.batch import coefficients
from fireopd_jax.method.losses.supervised import NegativeLogLikelihood
from fireopd_jax.metrics import results
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.recipe.optim import SftConfig
from fireopd_jax.runs.checkpoints import Checkpoints
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.runtime.signals import StopFlag
from fireopd_jax.sharding.mesh import replicate, replicated, shard_rows
from fireopd_jax.training.loop import run_steps
from fireopd_jax.training.update import (
    Metrics,
    init_state,
    make_optimizer,
    make_update,
    skip_reason,
)
from fireopd_jax.types import Batch, Prompts, Rollout, Scores, TokenStats

LOSS_WINDOW = 10
"""Steps over which the loss is averaged before it may end the stage."""


def supervised_batch(prompts: Prompts) -> Batch:
    """Take the references as rollouts; each token of the batch has the same share of the loss."""
    assert prompts.reference is not None and prompts.reference_length is not None
    tokens = jnp.asarray(prompts.reference)
    mask = jnp.arange(tokens.shape[1])[None] < prompts.reference_length[:, None]
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    stats = TokenStats(logprob=zeros, entropy=zeros)
    rollout = Rollout(
        prompts=prompts,
        tokens=tokens,
        mask=mask,
        logprob=zeros,
        model_logprob=zeros,
        finished=mask.any(axis=1),
        version=jnp.zeros_like(tokens),
    )
    return Batch(
        rollout=rollout,
        scores=Scores(student=stats, teacher=stats),
        weight=mask.astype(jnp.float32),
        coefficient=coefficients(mask, mask.any(axis=1), "token"),
    )


def supervise(
    name: str,
    model: LanguageModel,
    params: Params,
    loader: PromptLoader,
    config: SftConfig,
    *,
    mesh: Mesh,
    home: Path,
    stop: StopFlag,
    log: Callable[[str], None],
) -> Params:
    """Train `params` on the loader's references; interrupted, it goes on from `home`."""
    optimizer = make_optimizer(config.optim, config.steps)
    step_fn = make_update(
        model,
        NegativeLogLikelihood(),
        optimizer,
        micro_batch_size=config.optim.micro_batch_size,
        remat=config.optim.remat,
        mesh=mesh,
    )
    whole = replicated(mesh)
    update = jax.jit(
        lambda state, prompts: step_fn(state, supervised_batch(prompts), jnp.float32(1)),
        donate_argnums=0,
        out_shardings=(whole, whole),
    )
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=whole)
    state = replicate(mesh, init_state(copy(params), optimizer))
    checkpoints = Checkpoints(home / "checkpoints", keep=1)
    start = 0
    if checkpoints.latest() is not None:
        start, state, position = checkpoints.restore(state)
        loader.set_state(position)
        log(f"{name}: goes on from step {start}")

    with Tracker(home) as tracker:
        tracker.truncate(start + 1)
        losses = dict(tracker.history("loss"))

        def advance(state, step):
            return update(state, shard_rows(mesh, next(loader)))

        def report(step: int, metrics: Metrics) -> dict[str, object]:
            values = results(metrics)
            tracker.log(step, {k: v for k, v in values.items() if not k.startswith("policy/")})
            losses[step] = values["loss"]
            if values["skipped"]:
                log(f"{name}: step {step} skipped: {skip_reason(values)}")
            return {"loss": values["loss"]}

        def enough(done: int) -> bool:
            # The newest loss may not be reported yet; whether it is must not matter.
            recent = [losses.get(step, inf) for step in range(done - LOSS_WINDOW, done)]
            return config.stop_loss is not None and fmean(recent) <= config.stop_loss

        def saves(done: int) -> bool:
            return done % config.save_every == 0 and done < config.steps

        def after(done, state, stopping):
            if stopping or saves(done):
                checkpoints.save(done, copy(state), loader.get_state())
                if stopping:
                    checkpoints.close()

        state = run_steps(
            f"sft {name}", state, start, config.steps, advance, report, after, stop, saves, enough
        )
    checkpoints.close()
    if skipped := int(state.skipped):
        log(f"{name}: {skipped} of {int(state.updates)} updates were skipped")
    return state.params
