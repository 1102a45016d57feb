"""What a range of the vocabulary says of each token, how ranges merge, and what it amounts to.

    an implementation: hidden, head, ids, support, ... -> State
    finish:            State -> log-probability, entropy, log-sum-exp, of the support, top-K

With z the logits of the range: m = max z, s = sum e^(z-m), t = sum (z-m) e^(z-m). Then
log-sum-exp = m + log s and H = log s - t/s, two terms that are never negative: nothing cancels.
"""

import dataclasses
import math
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
"""(hidden [N, D], head, ids [N], support_ids [N, S], scale [], limit, settings, weigh) -> State.

`limit`, i32[] or None, is how many of the first `settings.vocabulary` columns exist; None: all.
`weigh` is None, or ((1 + beta c^S) [N], alpha []), and then the state has a weight."""


def entropy(state: State) -> Float32[Array, " N"]:
    """Return H = log s - t/s in nats."""
    return jnp.log(state.mass) - state.tilt / state.mass


def student_factor(
    student_entropy: Float32[Array, "*N"], beta: float | Array, vocabulary: int
) -> Float32[Array, "*N"]:
    """Return 1 + beta c^S, c^S = H^S / log V."""
    return 1.0 + beta * _share(student_entropy, vocabulary)


def weight(
    entropy: Float32[Array, " N"], weigh: tuple[Array, Array], vocabulary: int
) -> Float32[Array, " N"]:
    """Return w = (1 + alpha c^T) (1 + beta c^S), c^T = 1 - H / log V.

    References: arXiv 2606.02684, Eq. 5-7.
    """
    confusion, alpha = weigh
    return (1.0 + alpha * (1.0 - _share(entropy, vocabulary))) * confusion


def with_weight(state: State, weigh: tuple[Array, Array] | None, vocabulary: int) -> State:
    """Add the weight, where it is asked for."""
    if weigh is None:
        return state
    return dataclasses.replace(state, weight=weight(entropy(state), weigh, vocabulary))


def _share(entropy: Array, vocabulary: int) -> Array:
    # One word leaves nothing to be unsure of: H = 0 = log V.
    return jnp.clip(entropy / max(math.log(vocabulary), 1e-6), 0.0, 1.0)


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
        values, ids = (_side_by_side(each) for each in gathered)
        values, ids = best_of(values, ids, k)
    return State(peak, mass, tilt, picked, support, values, ids)


def best_of(
    values: Float32[Array, "N C"], ids: Int32[Array, "N C"], k: int
) -> tuple[Float32[Array, "N K"], Int32[Array, "N K"]]:
    """Sort candidates, of equals the lowest id first, and keep the first `k`."""
    negative, ids = lax.sort((-jnp.asarray(values), jnp.asarray(ids)), dimension=1, num_keys=2)
    return -negative[:, :k], ids[:, :k]


def _side_by_side(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])
