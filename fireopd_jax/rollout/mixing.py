"""Mixtures of sampled and reference responses: the on-policy fraction of GKD, arXiv 2306.13649.

prompts -> choice of rows -> rollout of the others -> references inserted in the chosen rows
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from fireopd_jax.types import Array, Prompts, Rollout, Writer


def given_rows(prompts: Prompts, fraction: float, seed: int) -> Bool[np.ndarray, " B"]:
    """Return the rows that get references, each with probability 1 - `fraction`.

    The choice is a function of `seed` and the row's sample id.
    """
    lots = [np.random.default_rng([seed, int(i) & 0xFFFFFFFF]).random() for i in prompts.sample_id]
    return np.asarray(lots) >= fraction


def without(prompts: Prompts, given: Bool[np.ndarray, " B"]) -> Prompts:
    """Return the prompts with length 0 in the chosen rows, so that no response is sampled."""
    length = np.where(given, 0, prompts.length).astype(np.int32)
    return dataclasses.replace(prompts, length=length)


def mix(rollout: Rollout, prompts: Prompts, given: Bool[Array, " B"]) -> Rollout:
    """Return the rollout with references as the responses of the chosen rows.

    Their tokens have log-probability 0, version 0 and `Writer.REFERENCE`.

    Raises ValueError without references, or if their width is not that of the responses.
    """
    if prompts.reference is None or prompts.reference_length is None:
        raise ValueError("rows with given responses need references")
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
        writer=jnp.where(row, Writer.REFERENCE, rollout.writer),
    )
