"""A part of the rows learns from given responses instead of its own: GKD's fraction of each.

prompts -> which rows draw -> rollout -> the other rows' references in place of nothing
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from fireopd_jax.types import Array, Prompts, Rollout

GIVEN = -1
"""Version of tokens that no parameters of this run drew."""


def given_rows(prompts: Prompts, fraction: float, seed: int) -> Bool[np.ndarray, " B"]:
    """Choose the rows that do not draw: each by a lot of its own, a function of its sample id."""
    lots = [np.random.default_rng([seed, int(i) & 0xFFFFFFFF]).random() for i in prompts.sample_id]
    return np.asarray(lots) >= fraction


def without(prompts: Prompts, given: Bool[np.ndarray, " B"]) -> Prompts:
    """Let the chosen rows draw nothing: their length is 0."""
    length = np.where(given, 0, prompts.length).astype(np.int32)
    return dataclasses.replace(prompts, length=length)


def mix(rollout: Rollout, prompts: Prompts, given: Bool[Array, " B"]) -> Rollout:
    """Put the references of the chosen rows in the place of their responses.

    A reference is as wide as a response may be. Its log-probabilities are 0: nobody drew it.
    """
    if prompts.reference is None or prompts.reference_length is None:
        raise ValueError("rows that learn from given responses need references")
    room = rollout.tokens.shape[1]
    reference, length = (jnp.asarray(x) for x in (prompts.reference, prompts.reference_length))
    if reference.shape[1] != room:
        raise ValueError(f"references of width {reference.shape[1]}; expected {room}")
    given = jnp.asarray(given)
    row = given[:, None]
    there = jnp.arange(room)[None] < length[:, None]
    return dataclasses.replace(
        rollout,
        prompts=prompts,
        tokens=jnp.where(row, jnp.where(there, reference, 0), rollout.tokens),
        mask=jnp.where(row, there, rollout.mask),
        finished=jnp.where(given, length > 0, rollout.finished),
        version=jnp.where(row, GIVEN, rollout.version),
    )
