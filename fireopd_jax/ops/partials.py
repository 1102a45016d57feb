"""Partial statistics of each token over a range of the vocabulary, and how to merge them.

    an implementation: hidden, head, ids, support, ... -> HeadPartials
    fused:             HeadPartials -> log-probability, entropy, log-sum-exp, support, top-K

With z the logits of the range: m = max z, s = sum e^(z-m), t = sum (z-m) e^(z-m). Then log-sum-exp
= m + log s and H = log s - t/s, whose two terms are never negative, so nothing cancels.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int32

from fireopd_jax.types import Array, pytree

LOWEST = -1e30
"""m of an empty range: finite, because updates multiply m - max by s = 0."""


@pytree
class HeadPartials:
    """Statistics of N tokens over a range of columns, float32."""

    max_logit: Float32[Array, " N"]
    """m; `LOWEST` for an empty range"""
    sum_exp: Float32[Array, " N"]
    """s"""
    sum_exp_logit: Float32[Array, " N"]
    """t"""
    id_logit: Float32[Array, " N"]
    """Logit of the token's id; -inf if it is outside the range."""
    support_logits: Float32[Array, "N S"]
    """Logits at the token's support ids; -inf outside the range."""
    top_logits: Float32[Array, "N K"]
    """The K largest logits, falling, of equals the lowest id first; -inf where there are fewer."""
    top_ids: Int32[Array, "N K"]
    """Their columns; -1 where the logit is -inf."""
    weight: Float32[Array, " N"] | None = None
    """FiRe-OPD's token weight with log V as the maxima, if the implementation computes it."""


Forward = Callable[..., HeadPartials]
"""(hidden [N, D], head, ids [N], support_ids [N, S], scale [], limit, settings, weight_inputs)
-> HeadPartials.

`limit`, i32[] or None, is how many of the first `settings.vocabulary` columns exist; None: all.
`weight_inputs` is None, or ((1 + beta c^S) [N], alpha []), and then the result has a weight.
"""


def entropy(partials: HeadPartials) -> Float32[Array, " N"]:
    """Return H = log s - t/s in nats."""
    return jnp.log(partials.sum_exp) - partials.sum_exp_logit / partials.sum_exp


def student_factor(
    student_entropy: Float32[Array, "*N"], beta: float | Array, vocabulary: int
) -> Float32[Array, "*N"]:
    """Return 1 + beta c^S, c^S = H^S / log V (arXiv 2606.02684, Eq. 5-7)."""
    return 1.0 + beta * _share(student_entropy, vocabulary)


def weight(
    entropy: Float32[Array, " N"], weight_inputs: tuple[Array, Array], vocabulary: int
) -> Float32[Array, " N"]:
    """Return w = (1 + alpha c^T) (1 + beta c^S), c^T = 1 - H / log V.

    `weight_inputs` is ((1 + beta c^S) [N], alpha []).

    References: arXiv 2606.02684, Eq. 5-7.
    """
    factor, alpha = weight_inputs
    return (1.0 + alpha * (1.0 - _share(entropy, vocabulary))) * factor


def with_weight(
    partials: HeadPartials, weight_inputs: tuple[Array, Array] | None, vocabulary: int
) -> HeadPartials:
    """Return `partials` with the weight, or unchanged if `weight_inputs` is None."""
    if weight_inputs is None:
        return partials
    w = weight(entropy(partials), weight_inputs, vocabulary)
    return dataclasses.replace(partials, weight=w)


def _share(entropy: Array, vocabulary: int) -> Array:
    # With one token id, H = log V = 0: avoid 0 / 0.
    return jnp.clip(entropy / max(math.log(vocabulary), 1e-6), 0.0, 1.0)


def merge(stacked: HeadPartials, k: int) -> HeadPartials:
    """Return the merged partials of disjoint ranges, stacked on axis 0 in the order of columns."""
    max_logit = stacked.max_logit.max(axis=0)
    gap = stacked.max_logit - max_logit[None]
    decay = jnp.exp(gap)
    values, ids = best_of(_side_by_side(stacked.top_logits), _side_by_side(stacked.top_ids), k)
    return HeadPartials(
        max_logit=max_logit,
        sum_exp=(decay * stacked.sum_exp).sum(axis=0),
        sum_exp_logit=(decay * (stacked.sum_exp_logit + gap * stacked.sum_exp)).sum(axis=0),
        id_logit=stacked.id_logit.max(axis=0),
        support_logits=stacked.support_logits.max(axis=0),
        top_logits=values,
        top_ids=ids,
    )


def merge_over(axis: str, partials: HeadPartials, k: int) -> HeadPartials:
    """Return the merged partials of the devices along a mesh axis; call inside `shard_map`.

    Takes one maximum, one sum, and one gather of the top-K candidates of each device.
    """
    max_logit = lax.pmax(partials.max_logit, axis)
    gap = partials.max_logit - max_logit
    decay = jnp.exp(gap)
    sum_exp, sum_exp_logit = lax.psum(
        (decay * partials.sum_exp, decay * (partials.sum_exp_logit + gap * partials.sum_exp)), axis
    )
    id_logit, support_logits = lax.pmax((partials.id_logit, partials.support_logits), axis)
    values, ids = partials.top_logits, partials.top_ids
    if k:
        gathered = lax.all_gather((values, ids), axis)
        values, ids = (_side_by_side(each) for each in gathered)
        values, ids = best_of(values, ids, k)
    return HeadPartials(max_logit, sum_exp, sum_exp_logit, id_logit, support_logits, values, ids)


def best_of(
    values: Float32[Array, "N C"], ids: Int32[Array, "N C"], k: int
) -> tuple[Float32[Array, "N K"], Int32[Array, "N K"]]:
    """Return the `k` largest candidates and their ids, of equals the lowest id first."""
    negative, ids = lax.sort((-jnp.asarray(values), jnp.asarray(ids)), dimension=1, num_keys=2)
    return -negative[:, :k], ids[:, :k]


def _side_by_side(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])
