"""What a range of the vocabulary says of each token, how ranges merge, and what it amounts to.

    an implementation: hidden, head, ids, support, ... -> State
    finish:            State -> log-probability, entropy, log-sum-exp, of the support, top-K

With z the logits of the range: m = max z, s = sum e^(z-m), t = sum (z-m) e^(z-m). Then
log-sum-exp = m + log s and H = log s - t/s, two terms that are never negative: nothing cancels.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int32

from fireopd_jax.types import Array, pytree

LOWEST = -1e30
"""The running maximum of nothing: finite, because updates multiply m - max by s = 0."""


@pytree
class State:
    """Statistics of N tokens over a range of columns, float32."""

    peak: Float32[Array, " N"]
    """m; `LOWEST` of an empty range."""
    mass: Float32[Array, " N"]
    """s"""
    tilt: Float32[Array, " N"]
    """t"""
    picked: Float32[Array, " N"]
    """Logit of the token's id; -inf where that is outside the range."""
    support: Float32[Array, "N S"]
    """Logits at its support ids, likewise."""
    top_values: Float32[Array, "N K"]
    """The K largest logits, falling, of equals the lowest id first; -inf where there are fewer."""
    top_ids: Int32[Array, "N K"]
    """Their columns; -1 where the value is -inf."""
    weight: Float32[Array, " N"] | None = None
    """Of FiRe-OPD with the log V normaliser, from implementations that compute it on the way."""


Forward = Callable[..., State]
"""(hidden [N, D], head [V, D], ids [N], support_ids [N, S], scale [], limit, settings) -> State.

`limit`, i32[] or None, is how many of the first `settings.vocabulary` columns exist; None: all."""


def merge(states: State, k: int) -> State:
    """Merge states of disjoint ranges, stacked on the first axis in the order of their columns."""
    peak = states.peak.max(axis=0)
    gap = states.peak - peak[None]
    decay = jnp.exp(gap)
    values, ids = best_of(_side_by_side(states.top_values), _side_by_side(states.top_ids), k)
    return State(
        peak=peak,
        mass=(decay * states.mass).sum(axis=0),
        tilt=(decay * (states.tilt + gap * states.mass)).sum(axis=0),
        picked=states.picked.max(axis=0),
        support=states.support.max(axis=0),
        top_values=values,
        top_ids=ids,
    )


def merge_over(axis: str, state: State, k: int) -> State:
    """Merge the states of the devices along a mesh axis, inside `shard_map`: a maximum, a sum."""
    peak = lax.pmax(state.peak, axis)
    gap = state.peak - peak
    decay = jnp.exp(gap)
    mass, tilt = lax.psum((decay * state.mass, decay * (state.tilt + gap * state.mass)), axis)
    picked, support = lax.pmax((state.picked, state.support), axis)
    values, ids = state.top_values, state.top_ids
    if k:
        gathered = lax.all_gather((values, ids), axis)
        values, ids = best_of(*(_side_by_side(each) for each in gathered), k)
    return State(peak, mass, tilt, picked, support, values, ids)


def best_of(
    values: Float32[Array, "N C"], ids: Int32[Array, "N C"], k: int
) -> tuple[Float32[Array, "N K"], Int32[Array, "N K"]]:
    """Sort candidates, of equals the lowest id first, and keep the first `k`."""
    negative, ids = lax.sort((-values, ids), dimension=1, num_keys=2)
    return -negative[:, :k], ids[:, :k]


def _side_by_side(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
