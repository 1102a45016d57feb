"""Combine keep, weight and mask into the coefficients of a batch; done nowhere else.

    rollout, scores -> filter -> reweight -> coefficients -> Batch -> total_loss

Denominators are computed here, once, over the global batch. The loss is then a plain sum, so any
split of the rows into micro-batches adds up to the same loss and gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32

from fireopd_jax.method.stage import Aggregate, Filter, Keep, Reweighting, StageState
from fireopd_jax.metrics import Metric
from fireopd_jax.types import Array, Batch, Rollout, Scores, StageContext, pytree


@pytree
class StageStates:
    """States that the filter and the reweighting carry from step to step."""

    filter: StageState = ()
    reweight: StageState = ()


@pytree
class Assembled:
    """A batch ready for the update, with its keep mask and the next states of the stages."""

    batch: Batch
    keep: Keep
    states: StageStates
    """Stage states for the next step."""
    metrics: dict[str, Metric]
    """Metrics of the filter."""


def init_states(filter: Filter, reweight: Reweighting, batch_size: int) -> StageStates:
    """Return the states of the stages before the first step, for batches of `batch_size` rows."""
    return StageStates(filter.init(batch_size), reweight.init(batch_size))


def assemble(
    rollout: Rollout,
    scores: Scores,
    filter: Filter,
    reweight: Reweighting,
    aggregate: Aggregate,
    context: StageContext | None = None,
    states: StageStates | None = None,
) -> Assembled:
    """Filter and weight a scored rollout, and compute its coefficients; no gradient passes.

    `context` defaults to `stage_context(rollout)`, with one teacher. Stages with a state need
    `states`: from `init_states`, or from the previous step.
    """
    rollout, scores = jax.lax.stop_gradient((rollout, scores))
    context = stage_context(rollout) if context is None else context
    states = StageStates() if states is None else states
    keep, of_filter = filter(scores, context, states.filter)
    weight, of_reweight = reweight(scores, context, keep, states.reweight)
    coefficient = coefficients(rollout.mask, keep, aggregate)
    batch = Batch(rollout, scores, jax.lax.stop_gradient(weight), coefficient)
    metrics = filter.metrics(scores, context, states.filter)
    return Assembled(batch, keep, StageStates(of_filter, of_reweight), metrics)


def stage_context(
    rollout: Rollout,
    num_teachers: int = 1,
    vocab_size: int | None = None,
    *,
    progress: Float32[Array, ""] | float = 0.0,
    special: tuple[int, ...] | None = None,
    stop: tuple[int, ...] | None = None,
) -> StageContext:
    """Return the context of the stages in one step: masks, routes and ids besides the scores."""
    return StageContext(
        mask=rollout.mask,
        teacher=rollout.prompts.teacher,
        num_teachers=num_teachers,
        vocab_size=vocab_size,
        tokens=rollout.tokens,
        sample_id=rollout.prompts.sample_id,
        progress=progress,
        special=special,
        stop=stop,
    )


def coefficients(
    mask: Bool[Array, "B T"], keep: Keep, aggregate: Aggregate
) -> Float32[Array, "B T"]:
    """Return each token's share of the loss; they sum to 1, or are all 0 when nothing is kept.

    "seq": keep * mask / (L_i N_keep), L_i the kept tokens of row i: each kept trajectory counts
    once. "token": keep * mask / N_tokens: each kept token counts once.

    Raises ValueError for another aggregate.
    """
    kept = jnp.asarray(mask & (keep if keep.ndim == 2 else keep[:, None]))
    length = jnp.sum(kept, axis=1, keepdims=True)
    if aggregate == "seq":
        size = jnp.maximum(length, 1).astype(jnp.float32) * jnp.maximum(jnp.sum(length > 0), 1)
    elif aggregate == "token":
        size = jnp.maximum(jnp.sum(length), 1).astype(jnp.float32)
    else:
        raise ValueError(f"unknown aggregate {aggregate!r}; known: seq, token")
    return jnp.where(kept, 1.0 / size, 0.0)


def total_loss(per_token: Float32[Array, "B T"], batch: Batch) -> Float32[Array, ""]:
    """Return the sum of coefficient * weight * per_token over tokens that have a coefficient."""
    # Both factors are guarded: a NaN in a dropped row must reach neither value nor gradient.
    live = batch.coefficient != 0
    share = jnp.where(live, batch.coefficient * batch.weight, 0.0)
    return jnp.sum(jax.lax.stop_gradient(share) * jnp.where(live, per_token, 0.0))
