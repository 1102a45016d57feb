"""Sample a batch of responses as one pure function of parameters and prompts.

    prompts -> request table -> `Loop.run` until no row is left -> Rollout

The rows are sharded over the replicas of the mesh, with one loop for each replica, so a replica
with short responses does not wait for others at every step. The devices of a replica, on the
`tensor` axis, share its model, KV cache and vocabulary. `streaming.Engine` has the same loop for
requests that arrive over time, with budgets and streaming.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.layouts import AUTO, CacheLayout, layout_of
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.meshes import over_data, replica_count, split_cache
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import (
    RUNNING,
    STOP,
    Requests,
    Shape,
    empty_requests,
    enqueue,
    initial_state,
)
from fireopd_jax.sharding.mesh import REPLICAS
from fireopd_jax.types import Prompts, Rollout, TokenStats, Writer

UNBOUNDED = 2**30
"""More decoding steps than any rollout has."""


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    sampling: Sampling,
    version: Int32[Array, ""],
    *,
    max_tokens: int,
    slots: int | None = None,
    memory: CacheLayout = AUTO,
    mesh: Mesh | None = None,
) -> Rollout:
    """Return one sampled response to each prompt.

    `max_tokens` is the static width T of the result; `sampling.max_tokens` is a traced limit of at
    most T. Rows with prompts of length 0 have empty responses. A response ends with a stop token,
    which belongs to it, at the limit, or before a token whose logits are not finite. Each replica
    decodes at most `slots` rows at a time; consecutive rows with the same prompt share its prefill.
    """
    rows, width = prompts.tokens.shape
    memory = layout_of(memory, model.config, mesh, width + max_tokens, slots)
    shape = Shape.of(rows // replica_count(mesh), width, max_tokens, slots, memory.align)
    loop = Loop(model, memory, shape.piece, mesh)

    def draw(params: Params, prompts: Prompts, sampling: Sampling, version: Array) -> Rollout:
        requests = table(prompts, sampling, max_tokens)
        return as_rollout(prompts, complete(loop, shape, params, requests, version))

    whole, split = PartitionSpec(), PartitionSpec(REPLICAS)
    knobs = jax.tree.map(lambda knob: whole if knob.ndim == 0 else split, sampling.rows(rows))
    draw = over_data(draw, mesh, (whole, split, knobs, whole), split)
    return draw(model.to_decode_layout(params, mesh), prompts, sampling.rows(rows), version)


def complete(
    loop: Loop,
    shape: Shape,
    params: Params,
    requests: Requests,
    version: Int32[Array, ""],
    unfinished: int = 0,
) -> Requests:
    """Return the request table once at most `unfinished` of its rows have not ended.

    `params` are in the decode layout. Rows of length 0 are empty; a row with tokens is continued.
    """
    rows = requests.length.shape[0]
    cache = loop.memory.init(loop.model.config, shape)
    cache = split_cache(cache, loop.memory, loop.model, loop.mesh)
    state = initial_state(requests, shape.slots, shape.entries, cache)
    waiting = (requests.length > 0) & (requests.finish == RUNNING)
    queue = jnp.where(waiting, jnp.arange(rows, dtype=jnp.int32), rows)
    state = dataclasses.replace(state, ring=enqueue(state.ring, requests, queue))
    return loop.run(params, state, jnp.int32(UNBOUNDED), version, unfinished).requests


def as_rollout(prompts: Prompts, requests: Requests) -> Rollout:
    """Return the responses of a request table; one that has not ended is not `finished`."""
    return Rollout(
        prompts=prompts,
        tokens=requests.tokens,
        mask=jnp.arange(requests.tokens.shape[1])[None] < requests.count[:, None],
        logprob=requests.logprob,
        model_logprob=requests.model_logprob,
        finished=requests.finish == STOP,
        version=requests.version,
        writer=jnp.full_like(requests.tokens, Writer.STUDENT),
        policy=TokenStats(requests.policy_logprob, requests.policy_entropy),
    )


def table(prompts: Prompts, sampling: Sampling, room: int) -> Requests:
    """Return a request table of the prompts, for responses of up to `room` tokens."""
    rows, width = prompts.tokens.shape
    return dataclasses.replace(
        empty_requests(rows, width, room, sampling),
        prompt=jnp.asarray(prompts.tokens),
        length=jnp.asarray(prompts.length),
        sample_id=jnp.asarray(prompts.sample_id),
    )
