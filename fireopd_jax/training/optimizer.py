"""AdamW or Muon with its schedule, computing in float32 for parameters of any dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from fireopd_jax.models.lora import TARGETS
from fireopd_jax.recipe.optim import OptimConfig

MUON_RMS = 0.2
"""Root mean square of Muon's step at learning rate 1: that of AdamW's, whose rates then suit Muon
(arXiv:2502.16982, Equation 4)."""
MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
"""Axes of a matrix; those before are of layers and experts, each with a matrix of its own."""


def learning_rate(config: OptimConfig, updates: int, peak: float | None = None) -> optax.Schedule:
    """Return the learning-rate schedule over `updates` optimizer steps, warm-up included.

    `peak` is in place of `config.learning_rate`.
    """
    peak = config.learning_rate if peak is None else peak
    end = peak * config.final_fraction
    rest = max(updates - config.warmup_steps, 1)
    courses = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
    }
    course = courses[config.schedule]()
    if not config.warmup_steps:
        return course
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, course], [config.warmup_steps])


def make_optimizer(config: OptimConfig, updates: int) -> optax.GradientTransformation:
    """Return the optimizer with schedule and clipping, in float32 for parameters of any dtype."""
    rate = learning_rate(config, updates)
    if config.optimizer == "adamw":
        optimizer = _adamw(config, rate)
    else:
        rest = learning_rate(config, updates, config.adam_learning_rate)
        parts: Any = {"muon": _muon(config, rate), "adamw": _adamw(config, rest)}
        optimizer = optax.partition(parts, optimizers)
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return in_float32(optimizer, master=config.master)


def _adamw(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moment_dtype),
    )


def _muon(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate,
        beta=config.beta1,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moment_dtype),
        consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: MATRIX, params),
    )


def optimizers(params: Any) -> Any:
    """Return the tree with `muon` at what Muon updates, `adamw` elsewhere.

    Muon updates the kernels of the layers' linear maps, those of experts too, and LoRA's A and B;
    neither a router, nor embeddings and head (arXiv:2502.16982, Section 2.2).
    """

    def of(path: tuple[Any, ...], _: Any) -> str:
        names = [key.key for key in path]
        linear = any(name in TARGETS for name in names)
        return "muon" if linear and names[-1] != "bias" else "adamw"

    return jax.tree.map_with_path(of, params)


def in_float32(
    optimizer: optax.GradientTransformation, *, master: bool
) -> optax.GradientTransformation:
    """Return the optimizer wrapped to get gradients and parameters in float32.

    With `master`, parameters of another dtype have a float32 copy in the state, which the optimizer
    updates; the parameters are that copy rounded. The state is (copy or EmptyState, inner state).
    """

    def init(params: Any):
        wide = optax.tree.cast(params, jnp.float32)
        narrow = any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(params))
        return wide if master and narrow else optax.EmptyState(), optimizer.init(wide)

    def update(updates: Any, state: Any, params: Any = None):
        kept, inner = state
        own = isinstance(kept, optax.EmptyState)
        wide = optax.tree.cast(params, jnp.float32)
        before = wide if own else kept
        steps, inner = optimizer.update(optax.tree.cast(updates, jnp.float32), inner, before)
        if own:
            return steps, (kept, inner)
        kept = optax.apply_updates(before, steps)
        rounded = jax.tree.map(lambda new, old: new.astype(old.dtype), kept, params)
        steps = jax.tree.map(lambda new, old: new.astype(jnp.float32) - old, rounded, wide)
        return steps, (kept, inner)

    return optax.GradientTransformation(init, update)
