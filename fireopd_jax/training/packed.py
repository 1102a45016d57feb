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
from typing import Any

import jax
import jax.numpy as jnp

from fireopd_jax.metrics import Max, Mean, merge
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.packing import (
    Packing,
    PassShape,
    Predicted,
    cotangents,
    gather_tokens,
    last_true,
    over_blocks,
    pack_rows,
    predicted_by,
    slots_of,
    states_at,
    tokens_at,
)
from fireopd_jax.types import Array, Batch

Metrics = dict[str, Any]
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
) -> tuple[Params, Metrics]:
    """Return the gradient in float32, and the metrics, summed over the passes.

    A pass has about `tokens` tokens for each of the `groups` of rows, at least the longest row.
    `whole_rows`: the loss of a token depends on other tokens of its row, so that all response
    tokens of a pass are in one block.
    """
    prompts, (rows, room) = batch.rollout.prompts, batch.rollout.tokens.shape
    shape = PassShape.of(prompts.tokens.shape[1] + room, tokens, rows // groups)
    counted = last_true(batch.coefficient != 0)
    packing = pack_rows(prompts.length, counted, shape.length, groups)
    size = shape.tokens if whole_rows else shape.head_block(groups)
    passes = _Passes(hidden_of, loss_of, batch, packing, shape, size)

    def add(j: Array, carry: tuple[Params, Metrics, Array]) -> tuple[Params, Metrics, Array]:
        sums, metrics, square = carry
        grads, metrics = passes.gradient(j, params, metrics)
        square += sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))
        return jax.tree.map(jnp.add, sums, grads), metrics, square

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    found = jax.eval_shape(lambda: passes.metrics(0, params))
    start = (zeros, nothing(found), jnp.float32(0))
    count = packing.passes(shape)
    sums, metrics, square = jax.lax.fori_loop(0, count, add, start)
    # Its count is the number of passes.
    metrics["grad_square"] = Mean(square, count.astype(jnp.float32))
    return sums, metrics


@dataclasses.dataclass(frozen=True)
class _Passes:
    """A batch, its packs, and what is computed of each pass."""

    hidden_of: Hidden
    loss_of: OfTokens
    batch: Batch
    packing: Packing
    shape: PassShape
    size: int
    """Response tokens that pass through the head at a time."""

    def gradient(self, j: Array, params: Params, metrics: Metrics) -> tuple[Params, Metrics]:
        """Return the gradient of pass `j` in float32, and the metrics with those of the pass."""
        (hidden, head), pull = jax.vjp(lambda params: self._hidden(j, params), params)
        at = self._predicted(j)
        differentiate = jax.grad(self._of_block, argnums=(0, 1), has_aux=True)

        def block(part: Predicted, first: Array, carry: tuple[Array, Array, Metrics]):
            d_states, d_head, metrics = carry
            (to_states, to_head), found = differentiate(states_at(hidden, part), head, part)
            d_states = jax.lax.dynamic_update_slice_in_dim(d_states, to_states, first, axis=1)
            return d_states, d_head + to_head.astype(jnp.float32), merge(metrics, found)

        zeros = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
        d_states, d_head, metrics = over_blocks(at, self.size, block, (*zeros, metrics))
        (grads,) = pull((cotangents(d_states, at), d_head.astype(head.dtype)))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads), metrics

    def metrics(self, j: Array | int, params: Params) -> Metrics:
        """Return the metrics of all tokens of pass `j`, for their structure."""
        hidden, head = self._hidden(j, params)
        at = self._predicted(j)
        return self._of_block(states_at(hidden, at), head, at)[1]

    def _hidden(self, j: Array | int, params: Params) -> tuple[Array, Array]:
        rollout, shape = self.batch.rollout, self.shape
        slots = slots_of(self.packing, j, shape)
        ids = tokens_at(slots, self.packing, rollout.prompts.tokens, rollout.tokens)
        sequences = [shape.apart(x) for x in (ids, slots.position, slots.segment)]
        hidden, head = self.hidden_of(params, *sequences)
        return shape.together(hidden), head

    def _predicted(self, j: Array | int) -> Predicted:
        return predicted_by(self.packing, slots_of(self.packing, j, self.shape))

    def _of_block(self, states: Array, head: Array, at: Predicted) -> tuple[Array, Metrics]:
        part = dataclasses.replace(gather_tokens(per_token(self.batch), at), row=at.row)
        return self.loss_of(states, head, part)


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


def nothing(metrics: Metrics) -> Metrics:
    """Return metrics of no values, of the same structure."""

    def empty(metric: Mean | Max) -> Mean | Max:
        zero = jnp.float32(0)
        return Max(zero - jnp.inf, zero) if isinstance(metric, Max) else Mean(zero, zero)

    return jax.tree.map(empty, metrics, is_leaf=lambda x: isinstance(x, Mean | Max))
