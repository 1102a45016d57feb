"""A loss of the head statistics with its gradients computed on the way: three matrix products.

    block of tokens -> logits -> State -> loss and its cotangents -> d logits -> d hidden, d head

`fused` computes the logits twice, because at the time of the forward pass nobody knows the
cotangents of a statistic. Where the loss is known, too, a block of tokens meets the whole
vocabulary once. The price is d head in float32, read and written once a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float32

from fireopd_jax.ops import chunked, fused
from fireopd_jax.ops.logits import Settings, dot, exists, rows_of
from fireopd_jax.ops.state import State, merge_over
from fireopd_jax.types import Array

Loss = Callable[..., Array]
"""(log-probability, entropy, log-sum-exp, of the support, *arguments) of n tokens -> f32[n]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def total_loss(
    loss: Loss,
    hidden: Array,
    head: Array,
    ids: Array,
    support_ids: Array,
    scale: Array,
    arguments: Any,
    settings: Settings,
) -> Float32[Array, ""]:
    """Sum the loss of all tokens; differentiable to `hidden` and `head`."""
    inputs = (hidden, head, ids, support_ids, scale, arguments)
    return _over_shards(loss, inputs, settings, gradients=False)[0]


def _with_gradients(loss, hidden, head, ids, support_ids, scale, arguments, settings):
    inputs = (hidden, head, ids, support_ids, scale, arguments)
    return _over_shards(loss, inputs, settings, gradients=True)


def _scaled(loss, settings, gradients, cotangent):
    d_hidden, d_head = ((cotangent * g.astype(jnp.float32)).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None, None, None


total_loss.defvjp(_with_gradients, _scaled)


def default_token_block(vocabulary: int) -> int:
    """Give as many tokens as make 2^24 logits (64 MiB), 512 to 4096.

    A block reads and writes d head once; below 512 tokens that outweighs the products.
    """
    return min(max(2**24 // vocabulary, 512), 4096)


def _over_shards(loss, inputs, settings: Settings, gradients: bool):
    """Return the loss of all tokens, and d hidden and d head in the types of the inputs."""
    sharding = settings.sharding

    def local(hidden, head, ids, support_ids, scale, arguments):
        inputs = (hidden, head, ids, support_ids, scale, arguments)
        total, d_hidden, d_head = _over_blocks(loss, inputs, settings, gradients)
        if sharding and sharding.tokens:
            total, d_head = lax.psum((total, d_head), sharding.tokens)
        if sharding and sharding.vocabulary:
            d_hidden = lax.psum(d_hidden, sharding.vocabulary)
        return total, (d_hidden.astype(hidden.dtype), d_head.astype(head.dtype))

    if sharding:
        by_token, by_column = fused.specs(settings)
        local = jax.shard_map(
            local,
            mesh=sharding.mesh,
            in_specs=(by_token, by_column, by_token, by_token, P(), by_token),
            out_specs=(P(), (by_token, by_column)),
            check_vma=False,
        )
    return local(*inputs)


def _over_blocks(loss, inputs, settings: Settings, gradients: bool):
    """Scan over blocks of this device's tokens: the loss, d hidden, d head, in float32."""
    hidden, head, ids, support_ids, scale, arguments = inputs
    tokens, size = ids.shape[0], settings.token_block
    missing = -tokens % size

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
        return x.reshape((tokens + missing) // size, size, *x.shape[1:])

    per_token = jax.tree.map(blocks, (hidden, ids, support_ids, arguments))
    exist = blocks(jnp.ones((tokens,), bool))

    def step(d_head, block):
        (hidden, ids, support_ids, arguments), exist = block
        one = (hidden, head, ids, support_ids, scale)
        value, pull = _block_loss(loss, one, arguments, exist, settings)
        if not gradients:
            return d_head, (value, jnp.zeros(hidden.shape, jnp.float32))
        d_hidden, d_rows = pull()
        return d_head + d_rows, (value, d_hidden)

    start = jnp.zeros(head.shape if gradients else (0, 0), jnp.float32)
    d_head, (values, d_hidden) = lax.scan(step, start, (per_token, exist))
    d_hidden = d_hidden.reshape(tokens + missing, hidden.shape[1])[:tokens]
    return values.sum(), d_hidden, d_head if gradients else jnp.zeros(head.shape, jnp.float32)


def _block_loss(loss, inputs, arguments, exist: Array, settings: Settings):
    """Return the loss of a block, and the function that gives its gradients."""
    hidden, head, ids, support_ids, scale = inputs
    own_ids, own_support, limit, here = fused.own(head, ids, support_ids, settings)
    rows = rows_of(head, 0, here.vocabulary, here)
    z, slope = chunked.existing(hidden, rows, 0, scale, limit, here)
    wanted = jnp.concatenate([own_ids[:, None], own_support], axis=1)
    at = jnp.clip(wanted, 0, here.vocabulary - 1)
    inside = exists(wanted, here.vocabulary)
    picked = jnp.where(inside, jnp.take_along_axis(z, at, axis=1), -jnp.inf)
    sums = chunked.fold(chunked.empty(ids.shape[0]), z)
    state = State(*sums, picked[:, 0], picked[:, 1:], picked[:, :0], wanted[:, :0])
    if settings.sharding and settings.sharding.vocabulary:
        state = merge_over(settings.sharding.vocabulary, state, 0)
    values, saved = fused.values_of(state, support_ids, settings)
    # Neither the tokens that only fill the block nor the arguments have a gradient.
    arguments = lax.stop_gradient(arguments)
    each, pull = jax.vjp(lambda *v: jnp.where(exist, loss(*v, *arguments), 0.0), *values)

    def gradients() -> tuple[Array, Array]:
        *to_values, to_support = pull(jnp.ones_like(each))
        to_support = jnp.where(exists(support_ids, settings.vocabulary), to_support, 0.0)
        cotangents = (*to_values, to_support)
        asked = chunked.is_asked(cotangents)[:, None]
        d_z = chunked.gradient_of_logits(own_ids, own_support, saved, cotangents)(z, 0)
        operand = jnp.promote_types(hidden.dtype, head.dtype)
        d_x = jnp.where(asked, d_z * slope, 0.0).astype(operand)
        d_rows = chunked.rows_gradient(jnp.where(asked, hidden, 0), d_x, here)
        axis = int(here.turned)
        unused = head.shape[axis] - here.vocabulary
        padding = [(0, 0), (0, 0)]
        padding[axis] = (0, unused)
        return dot(d_x, rows, (1, 0)), jnp.pad(d_rows, padding) if unused else d_rows

    return each.sum(), gradients
