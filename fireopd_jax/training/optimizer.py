"""AdamW with its schedule, computing in float32 for parameters of any dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fireopd_jax.recipe.optim import OptimConfig


def learning_rate(config: OptimConfig, updates: int) -> optax.Schedule:
    """Return the learning-rate schedule over `updates` optimizer steps, warm-up included."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
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
    """Return AdamW with schedule and clipping, computing in float32 for parameters of any dtype."""
    adamw = optax.adamw(
        learning_rate(config, updates),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.moment_dtype),
    )
    if config.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return in_float32(adamw, master=config.master)


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
