"""From the arguments of `head.py` to an implementation: residuals, gradients, sharding.

    forward of an implementation -> HeadPartials -> (merged over shards) -> log-probabilities, ...
    cotangents -> the chunked backward pass, for every forward -> (summed over shards)

The custom VJP is outside `shard_map`: whole arrays are differentiated, and each sum over a mesh
axis is explicit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32, Int32

from fireopd_jax.ops import chunked
from fireopd_jax.ops.logits import HeadSettings, exists
from fireopd_jax.ops.partials import Forward, HeadPartials, merge_over, with_weight
from fireopd_jax.types import Array

Stats = Float32[Array, " N"]
Inputs = tuple[Array, Array, Array, Array, Array]
"""hidden, head, ids, support_ids, scale"""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def statistics(
    forward: Forward,
    hidden: Array,
    head: Array,
    ids: Array,
    support_ids: Array,
    scale: Array,
    settings: HeadSettings,
) -> tuple[Stats, Stats, Stats, Float32[Array, "N S"]]:
    """Return log-probability, entropy, log-sum-exp and the log-probabilities at `support_ids`.

    Differentiable in `hidden` and `head`, not in `scale`.
    """
    return _with_residuals(forward, hidden, head, ids, support_ids, scale, settings)[0]


def top_k(
    forward: Forward,
    hidden: Array,
    head: Array,
    ids: Array,
    scale: Array,
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None = None,
) -> tuple[Stats, Stats, Stats, Int32[Array, "N K"], Float32[Array, "N K"], Stats | None]:
    """Return log-probability, entropy, log-sum-exp, top-K ids, their log-probabilities, weight.

    The ids are in order of falling probability; the weight is None without `weight_inputs`.
    """
    no_support = jnp.zeros((ids.shape[0], 0), jnp.int32)
    partials = _run_forward(
        forward, (hidden, head, ids, no_support, scale), settings, weight_inputs
    )
    logprob, entropy, logsumexp, log_s = _finish(partials)
    top_logprob = (partials.top_logits - partials.max_logit[:, None]) - log_s[:, None]
    return logprob, entropy, logsumexp, partials.top_ids, top_logprob, partials.weight


def _finish(partials: HeadPartials) -> tuple[Array, Array, Array, Array]:
    log_s = jnp.log(partials.sum_exp)
    # The id's logit <= m and log s >= 0 hold exactly, hence logprob <= 0.
    logprob = (partials.id_logit - partials.max_logit) - log_s
    return (
        logprob,
        log_s - partials.sum_exp_logit / partials.sum_exp,
        partials.max_logit + log_s,
        log_s,
    )


def _with_residuals(forward, hidden, head, ids, support_ids, scale, settings):
    inputs = (hidden, head, ids, support_ids, scale)
    values, saved = values_of(_run_forward(forward, inputs, settings), support_ids, settings)
    return values, (inputs, saved)


def values_of(
    partials: HeadPartials, support_ids: Array, settings: HeadSettings
) -> tuple[tuple[Stats, Stats, Stats, Array], tuple[Stats, Stats, Stats]]:
    """Return the four statistics from merged partials, and the residuals (m, log s, H)."""
    logprob, entropy, logsumexp, log_s = _finish(partials)
    # A padded id has log-probability -inf even in a row of NaN.
    known = exists(support_ids, settings.vocabulary)
    support = (partials.support_logits - partials.max_logit[:, None]) - log_s[:, None]
    values = (logprob, entropy, logsumexp, jnp.where(known, support, -jnp.inf))
    return values, (partials.max_logit, log_s, entropy)


def _gradients(forward, settings, residuals, cotangents):
    (hidden, head, ids, support_ids, scale), saved = residuals
    *to_values, to_support = cotangents
    to_support = jnp.where(exists(support_ids, settings.vocabulary), to_support, 0.0)
    sharding, axis = settings.sharding, width_axis(head, settings)

    def local(hidden, head, ids, support_ids, scale, saved, cotangents):
        ids, support_ids, limit, local_settings = local_inputs(head, ids, support_ids, settings)
        # The sum over devices is in float32, so that d head is rounded once.
        dtype = jnp.float32 if sharding and sharding.tokens else head.dtype
        d_hidden, d_head = chunked.backward(
            hidden, head, ids, support_ids, scale, limit, local_settings, saved, cotangents, dtype
        )
        return sum_of_columns(d_hidden, settings), sum_of_devices(d_head, axis, settings)

    if sharding:
        tokens = by_token(settings)
        local = jax.shard_map(
            local,
            mesh=sharding.mesh,
            in_specs=(tokens, head_spec(settings), tokens, tokens, P(), tokens, tokens),
            out_specs=(own_tokens(settings), head_spec(settings, axis)),
            check_vma=False,
        )
    d_hidden, d_head = local(hidden, head, ids, support_ids, scale, saved, (*to_values, to_support))
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None, None, None


statistics.defvjp(_with_residuals, _gradients)


def _run_forward(
    forward: Forward, inputs: Inputs, settings: HeadSettings, weight_inputs: Any = None
) -> HeadPartials:
    """Return the merged partials, from each device's tokens and columns."""
    sharding = settings.sharding
    if sharding is None:
        return forward(*inputs, None, settings, weight_inputs)

    def local(hidden, head, ids, support_ids, scale, weight_inputs) -> HeadPartials:
        ids, support_ids, limit, local_settings = local_inputs(head, ids, support_ids, settings)
        axis = sharding.vocabulary
        if axis is None:
            return forward(
                hidden, head, ids, support_ids, scale, limit, local_settings, weight_inputs
            )
        partials = forward(hidden, head, ids, support_ids, scale, limit, local_settings)
        first = lax.axis_index(axis) * local_settings.vocabulary
        top_ids = jnp.where(partials.top_ids < 0, -1, partials.top_ids + first)
        partials = dataclasses.replace(partials, top_ids=top_ids)
        partials = merge_over(axis, partials, settings.k)
        return with_weight(partials, weight_inputs, settings.vocabulary)

    tokens = by_token(settings)
    weight_specs = (tokens, P()) if weight_inputs else P()
    sharded = jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(tokens, head_spec(settings), tokens, tokens, P(), weight_specs),
        out_specs=tokens,
        check_vma=False,
    )
    return sharded(*inputs, weight_inputs)


def by_token(settings: HeadSettings) -> P:
    """Return the partition spec of arrays with a token axis in front."""
    assert settings.sharding is not None
    return P(settings.sharding.tokens)


def own_tokens(settings: HeadSettings) -> P:
    """Return the partition spec of the gradient of the states."""
    sharding = settings.sharding
    assert sharding is not None
    if sharding.vocabulary is None or not sharding.own_tokens:
        return P(sharding.tokens)
    return P((*sharding.tokens, sharding.vocabulary))


def width_axis(head: Array, settings: HeadSettings) -> str | None:
    """Return the mesh axis over which the width of a head's gradient lies; None if it does not."""
    sharding, width = settings.sharding, head.shape[int(not settings.transposed)]
    if sharding is None or sharding.width is None:
        return None
    parts = sharding.mesh.shape[sharding.width]
    return sharding.width if parts > 1 and width % parts == 0 else None


def head_spec(settings: HeadSettings, width: str | None = None) -> P:
    """Return the partition spec of a head, or of its gradient, whose width lies on an axis."""
    assert settings.sharding is not None
    columns = settings.sharding.vocabulary
    return P(width, columns) if settings.transposed else P(columns, width)


def sum_of_columns(d_hidden: Array, settings: HeadSettings) -> Array:
    """Return the gradient of a device's tokens, summed over the shards of the columns."""
    sharding = settings.sharding
    if sharding is None or sharding.vocabulary is None:
        return d_hidden
    if sharding.own_tokens:
        return lax.psum_scatter(d_hidden, sharding.vocabulary, scatter_dimension=0, tiled=True)
    return lax.psum(d_hidden, sharding.vocabulary)


def sum_of_devices(d_head: Array, axis: str | None, settings: HeadSettings) -> Array:
    """Return the gradient of a device's part of the head, summed over the shards of the tokens."""
    others: tuple[str, ...] = ()
    if settings.sharding:
        shape = settings.sharding.mesh.shape
        others = tuple(name for name in settings.sharding.tokens if shape[name] > 1)
    if axis is not None:
        at = int(not settings.transposed)
        # Without the barrier libtpu's compiler fails where a loop adds up such sums.
        d_head = lax.optimization_barrier(
            lax.psum_scatter(d_head, axis, scatter_dimension=at, tiled=True)
        )
        others = tuple(name for name in others if name != axis)
    return lax.psum(d_head, others) if others else d_head


def local_inputs(head: Array, ids: Array, support_ids: Array, settings: HeadSettings):
    """Return ids, support ids, limit and settings relative to this device's columns.

    Ids of other devices' columns become -1; the limit is None if all local columns exist.
    """
    local_settings = dataclasses.replace(settings, sharding=None)
    if settings.sharding is None or settings.sharding.vocabulary is None:
        return ids, support_ids, None, local_settings
    columns = head.shape[int(settings.transposed)]
    first = lax.axis_index(settings.sharding.vocabulary) * columns
    ids, support_ids = (
        jnp.where(exists(each, settings.vocabulary), each - first, -1)
        for each in (ids, support_ids)
    )
    whole = settings.vocabulary == columns * settings.sharding.vocabulary_shards
    limit = None if whole else jnp.clip(settings.vocabulary - first, 0, columns)
    return ids, support_ids, limit, dataclasses.replace(local_settings, vocabulary=columns)
