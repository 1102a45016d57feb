"""Gradient of a batch whose rows are packed without padding, in passes of equal size.

    for each pack of rows:              as many as the batch fills, a traced number
        decoder -> states
        for each block of response tokens:
            states, head -> loss -> gradient to states and head
        gradient to the parameters, added up

Equal to the gradient of padded rows but for rounding. Rows and response ends without a coefficient,
such as those of dropped trajectories, cost nothing.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fireopd_jax.metrics import Mean, Metrics, merge, nothing
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.packing import Packs, Predicted, cotangents, gather_tokens, states_at
from fireopd_jax.types import Array, Batch

OfTokens = Callable[[Array, Array, Batch], tuple[Array, Metrics]]
"""(states [G, N, D], head, the batch at N tokens of each group) -> loss, metrics."""
Hidden = Callable[[Params, Array, Array, Array], tuple[Array, Array]]
"""(parameters, token ids, positions, segments) [G, L] -> states [G, L, D], head."""


def packed_gradients(
    hidden_of: Hidden,
    loss_of: OfTokens,
    params: Params,
    batch: Batch,
    tokens: int,
    *,
    groups: int = 1,
    whole_rows: bool = False,
    constrain: Callable[[Params], Params] = lambda params: params,
) -> tuple[Params, Metrics]:
    """Return the gradient in float32, and the metrics, summed over the passes.

    A pass has about `tokens` tokens for each of the `groups` of rows, at least the longest row.
    `whole_rows`: the loss of a token depends on other tokens of its row, so that all response
    tokens of a pass are in one block. `constrain` shards gradients like their parameters.
    """
    rollout, counted = batch.rollout, batch.coefficient != 0
    prompts = rollout.prompts
    sequences = (prompts.tokens, prompts.length, rollout.tokens, counted)
    packs = Packs.of(*sequences, tokens, groups, whole_rows=whole_rows)

    def states(j: Array | int, params: Params) -> tuple[tuple[Array, Array], Predicted]:
        hidden, head, at = packs.states(j, lambda *of: hidden_of(params, *of))
        return (hidden, head), at

    def of_block(states: Array, head: Array, at: Predicted) -> tuple[Array, Metrics]:
        part = dataclasses.replace(gather_tokens(per_token(batch), at), row=at.row)
        return loss_of(states, head, part)

    differentiate = jax.grad(of_block, argnums=(0, 1), has_aux=True)

    def gradient(j: Array, metrics: Metrics) -> tuple[Params, Metrics]:
        (hidden, head), pull, at = jax.vjp(lambda params: states(j, params), params, has_aux=True)

        def block(part: Predicted, first: Array, carry: tuple[Array, Array, Metrics]):
            d_states, d_head, metrics = carry
            (to_states, to_head), found = differentiate(states_at(hidden, part), head, part)
            d_states = jax.lax.dynamic_update_slice_in_dim(d_states, to_states, first, axis=1)
            return d_states, d_head + to_head.astype(jnp.float32), merge(metrics, found)

        d_states = jnp.zeros((*at.slot.shape, hidden.shape[-1]), hidden.dtype)
        start = (d_states, jnp.zeros(head.shape, jnp.float32), metrics)
        d_states, d_head, metrics = packs.over_blocks(at, block, start)
        (grads,) = pull((cotangents(d_states, at), d_head.astype(head.dtype)))
        return constrain(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)), metrics

    def add(j: Array, carry: tuple[Params, Metrics, Array]) -> tuple[Params, Metrics, Array]:
        sums, metrics, square = carry
        grads, metrics = gradient(j, metrics)
        square += sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))
        return constrain(jax.tree.map(jnp.add, sums, grads)), metrics, square

    def some_metrics() -> Metrics:
        (hidden, head), at = states(0, params)
        return of_block(states_at(hidden, at), head, at)[1]

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    start = (constrain(zeros), nothing(jax.eval_shape(some_metrics)), jnp.float32(0))
    sums, metrics, square = jax.lax.fori_loop(0, packs.passes, add, start)
    # Its count is the number of passes.
    metrics["grad_square"] = Mean(square, packs.passes.astype(jnp.float32))
    return sums, metrics


def per_token(batch: Batch) -> Batch:
    """Return the batch with what the losses use of it: one value for each row or token."""
    rollout = dataclasses.replace(
        batch.rollout,
        prompts=jax.tree.map(lambda _: None, batch.rollout.prompts),
        early=None,
        audit=None,
        original=None,
    )
    return dataclasses.replace(batch, rollout=rollout)
