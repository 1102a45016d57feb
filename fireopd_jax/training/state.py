"""The training state: parameters, optimizer state, counters and stage states."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int32

from fireopd_jax.method.batch import StageStates
from fireopd_jax.models.language_model import Params
from fireopd_jax.types import Array, pytree


@pytree
class TrainState:
    """Everything that an update changes."""

    params: Params
    """The trained parameters: all of the student's, or only its adapters."""
    opt_state: Any
    updates: Int32[Array, ""]
    """Number of updates, skipped ones included."""
    skipped: Int32[Array, ""]
    """Number of skipped updates."""
    stages: StageStates
    """States of the method's stages."""
    in_flight: Any = None
    """In a checkpoint, the rows that no step has learned from (`training.in_flight`), if any."""
    average: Params | None = None
    """Exponential moving average of `params`, where it is the teacher."""


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    stages: StageStates | None = None,
    *,
    averaged: bool = False,
) -> TrainState:
    """Return the state before the first update of `params`; `averaged` keeps a moving average."""
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        updates=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        stages=StageStates() if stages is None else stages,
        average=jax.tree.map(jnp.copy, params) if averaged else None,
    )
