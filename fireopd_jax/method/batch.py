"""The only place where keep, weight and mask meet.

    rollout, scores -> filter -> reweight -> coefficients -> Batch -> total_loss

Denominators are counted here, once, over the global batch. The loss is then a plain sum, so any
split of the rows into micro-batches adds up to the same loss and gradient.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32

from fireopd_jax.types import Array, Batch, Rollout, Rows, Scores

Keep = Bool[Array, " B"] | Bool[Array, "B T"]
Filter = Callable[[Scores, Rows], Keep]
Reweight = Callable[[Scores, Rows, Keep], Float32[Array, "B T"]]


def assemble(
    rollout: Rollout,
    scores: Scores,
    filter: Filter,
    reweight: Reweight,
    aggregate: Literal["seq", "token"],
    num_teachers: int,
    vocab_size: int | None = None,
    **known: Any,
) -> tuple[Batch, Keep]:
    """Return the batch of the update and what the filter kept; no gradient passes.

    `known` is what else the stages may want to know: fields of `Rows`.
    """
    rollout, scores = jax.lax.stop_gradient((rollout, scores))
    rows = rows_of(rollout, num_teachers, vocab_size, **known)
    keep = filter(scores, rows)
    weight = jax.lax.stop_gradient(reweight(scores, rows, keep))
    return Batch(rollout, scores, weight, coefficients(rollout.mask, keep, aggregate)), keep


def rows_of(rollout: Rollout, num_teachers: int, vocab_size: int | None, **known: Any) -> Rows:
    """Gather what the stages may know of the rows."""
    return Rows(
        mask=rollout.mask,
        teacher=rollout.prompts.teacher,
        num_teachers=num_teachers,
        vocab_size=vocab_size,
        tokens=rollout.tokens,
        sample_id=rollout.prompts.sample_id,
        **known,
    )


def coefficients(
    mask: Bool[Array, "B T"], keep: Keep, aggregate: Literal["seq", "token"]
) -> Float32[Array, "B T"]:
    """Return each token's share of the loss; they sum to 1, or are all 0 when nothing is kept.

    "seq": keep mask / (L_i N_keep), each kept trajectory counts once, L_i its kept tokens.
    "token": keep mask / N_tokens, each kept token counts once.
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
