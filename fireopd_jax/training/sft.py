"""Supervised training of a student before distillation, or of a teacher.

    prompts with references -> Batch (every reference token counts once) -> the same update

A reference is treated as a rollout from another source, so alignment, masks, denominators and the
optimizer step are those of distillation.
"""

from collections.abc import Callable
from contextlib import nullcontext
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.method.batch import coefficients
from fireopd_jax.method.losses.supervised import NegativeLogLikelihood
from fireopd_jax.metrics import Metrics, results
from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.recipe.optim import SftConfig
from fireopd_jax.runs.checkpoints import Checkpoints
from fireopd_jax.runs.trackers.reporting import Trackers
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.runtime.signals import StopFlag
from fireopd_jax.session.parameters import abstract_params, placed
from fireopd_jax.sharding.mesh import replicated, shard_rows
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.working import LONG_S, working
from fireopd_jax.training.guard import Guard
from fireopd_jax.training.loop import StepLoop
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.state import TrainState, init_state
from fireopd_jax.training.update import make_update, skip_reason
from fireopd_jax.types import Batch, Prompts, Rollout, Scores, TokenStats, Writer

Log = Callable[[str], None]

LOSS_WINDOW = 10
"""Number of steps that the loss is averaged over for `stop_loss`."""


def supervised_batch(prompts: Prompts) -> Batch:
    """Return the references as a batch in which each token has the same coefficient."""
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
        writer=jnp.full_like(tokens, Writer.REFERENCE),
    )
    return Batch(
        rollout=rollout,
        scores=Scores(student=stats, teacher=None),
        weight=mask.astype(jnp.float32),
        coefficient=coefficients(mask, mask.any(axis=1), "token"),
    )


class LossReports:
    """Writes the metrics of each step, and checks the loss against `stop_loss`."""

    def __init__(
        self, name: str, tracker: Tracker, stop_loss: float | None, log: Log, guard: Guard
    ):
        self.name, self.tracker, self.stop_loss, self.log = name, tracker, stop_loss, log
        self.guard = guard
        self.losses = dict(tracker.history("loss"))

    def __call__(self, done: int, metrics: Metrics) -> dict[str, object]:
        """Write a step's metrics; return the values for the progress."""
        values = results(metrics)
        self.tracker.log(done, {k: v for k, v in values.items() if not k.startswith("policy/")})
        self.losses[done] = values["loss"]
        if values["skipped"]:
            self.log(f"{self.name}: step {done} skipped: {skip_reason(values)}")
        self.guard.check(done, values)
        return {"loss": values["loss"]}

    def low_enough(self, done: int) -> bool:
        """Return whether the mean loss before the newest step is at most `stop_loss`."""
        # The newest loss may not be reported yet, so it is never used.
        recent = [self.losses.get(step, inf) for step in range(done - LOSS_WINDOW, done)]
        return self.stop_loss is not None and fmean(recent) <= self.stop_loss


class SftPrograms(NamedTuple):
    """The jitted programs of supervised training."""

    begin: Any
    """params -> first state; donates the parameters."""
    update: Any
    """(state, prompts with references) -> (next state, metrics); donates the state."""


def supervise(
    name: str,
    model: LanguageModel,
    start: Callable[[], Params],
    loader: PromptLoader,
    config: SftConfig,
    *,
    mesh: Mesh,
    home: Path,
    stop: StopFlag,
    log: Log,
    guard: Guard,
    trackers: Trackers | None = None,
    programs: SftPrograms | None = None,
) -> Params:
    """Return a model's parameters after training on the loader's references.

    `start` returns the initial parameters, which are donated; it is not called when the training
    is resumed from a checkpoint in `home`. `programs` are those of this training, if it has been
    compiled ahead. `guard` raises NothingLearnt.
    """
    begin, update = programs or sft_programs(model, config, mesh)
    checkpoints = Checkpoints(home / "checkpoints", keep=1)
    done = 0
    if checkpoints.latest() is None:
        state = begin(start())
    else:
        place = Placement(mesh)
        shapes = jax.eval_shape(begin, abstract_params(model, place))
        done, state, position = checkpoints.restore(placed(shapes, place))
        loader.set_state(position)
        log(f"{name}: resuming from step {done}")
    reporter = (trackers or Trackers.none()).reporter(f"sft_{name}")
    label = f"sft {name}"
    with (
        Tracker(home, reporter) as tracker,
        progress(label, config.steps, start=done) as advance,
        stop.held(),
    ):
        tracker.truncate(done + 1)
        report = LossReports(name, tracker, config.stop_loss, log, guard)
        loop = StepLoop(label, done, config.steps, report, stop=stop, advance=advance)
        for step in loop:
            if report.low_enough(step):
                break
            compiling = working(f"compiling the update of sft {name}", after=LONG_S)
            with compiling if step == done else nullcontext():
                state, metrics = update(state, shard_rows(mesh, next(loader)))
            saves = (step + 1) % config.save_every == 0 and step + 1 < config.steps
            loop.dispatched(step + 1, metrics, flush=saves)
            with stop.saving():
                if loop.stopping or saves:
                    checkpoints.save(step + 1, state, loader.get_state())
                if loop.stopping:
                    checkpoints.close()
        loop.flush()
    checkpoints.close()
    if skipped := int(state.skipped):
        log(f"{name}: {skipped} of {int(state.updates)} updates were skipped")
    guard.end(int(state.updates), int(state.skipped))
    return state.params


def sft_programs(model: LanguageModel, config: SftConfig, mesh: Mesh) -> SftPrograms:
    """Return the jitted programs of a model's supervised training."""
    optimizer = make_optimizer(config.optim, config.steps)
    step = make_update(
        model,
        NegativeLogLikelihood(),
        optimizer,
        micro_batch_size=config.optim.micro_batch_size,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        remat=config.optim.remat or "none",
        mesh=mesh,
    )

    def first(params: Params) -> TrainState:
        return init_state(params, optimizer)

    places = Placement(mesh).of(jax.eval_shape(first, model.shapes()))
    begin = jax.jit(first, donate_argnums=0, out_shardings=places)
    update = jax.jit(
        lambda state, prompts: step(state, supervised_batch(prompts), jnp.float32(1)),
        donate_argnums=0,
        out_shardings=(places, replicated(mesh)),
    )
    return SftPrograms(begin, update)
