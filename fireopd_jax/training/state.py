"""The training state: parameters, optimizer state, counters and stage states."""

import dataclasses
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
    average: Params | None = None
    """Exponential moving average of `params`, where it is the teacher."""


@pytree
class StateInFlight(TrainState):
    """The state as it is saved with `rollout.overprovision`.

    A class of its own, because a checkpoint has the fields of its class, the empty ones too: those
    of other runs stay as they were.
    """

    in_flight: Any = None
    """The rows that no step has learned from (`training.in_flight`)."""

    @staticmethod
    def of(state: TrainState, rows: Any) -> "StateInFlight":
        """Return the state with the rows in flight."""
        return StateInFlight(**_fields(state), in_flight=rows)

    def taken_apart(self) -> tuple[TrainState, Any]:
        """Return the state that updates change, and the rows in flight."""
        return TrainState(**_fields(self)), self.in_flight


def _fields(state: TrainState) -> dict[str, Any]:
    return {each.name: getattr(state, each.name) for each in dataclasses.fields(TrainState)}


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
