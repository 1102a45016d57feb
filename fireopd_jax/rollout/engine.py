"""Draw a batch of responses as one pure function of parameters and prompts.

    prompts -> table of requests -> `Loop.run` to its end -> Rollout

The rows are shared out over the `data` axis of the mesh, one loop a replica: a replica
whose responses are short does not wait at every step for the others. The devices of a replica, on
the `tensor` axis, share its model, its cache and the columns of its vocabulary. For requests that
come and go, budgets and streams there is `serving.Engine`, around the same loop.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.meshes import over_data, replica_count, split_cache
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import STOP, Requests, Shape, empty_requests, enqueue, initial_state
from fireopd_jax.types import Prompts, Rollout

CacheLayout = Dense | Paged
"""How keys and values are kept."""
DENSE = Dense()
UNBOUNDED = 2**30
"""Decoding steps that no rollout reaches."""


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    sampling: Sampling,
    version: Int32[Array, ""],
    *,
    max_tokens: int,
    slots: int | None = None,
    memory: CacheLayout = DENSE,
    mesh: Mesh | None = None,
) -> Rollout:
    """Draw one response to each prompt.

    `max_tokens` is the room, static; `sampling.max_tokens` the limit, traced, at most the room. A
    row of length 0 draws nothing. Rows end on a stop token, which is part of the response, at the
    limit, or before a token for which the logits are not finite. At most `slots` rows are decoded
    at a time, on each replica; rows that follow one another with the same prompt share its prefill.
    """
    replicas = replica_count(mesh)
    rows, width = prompts.tokens.shape
    shape = Shape.of(rows // replicas, width, max_tokens, slots, memory.align)

    def draw(params: Params, prompts: Prompts, sampling: Sampling, version: Array):
        requests = table(prompts, sampling, max_tokens)
        count = requests.length.shape[0]
        cache = memory.init(model.config, shape.slots, shape.entries, shape.capacity)
        cache = split_cache(cache, memory, model, mesh)
        state = initial_state(requests, shape.slots, shape.entries, cache)
        real = jnp.where(requests.length > 0, jnp.arange(count, dtype=jnp.int32), count)
        state = dataclasses.replace(state, ring=enqueue(state.ring, requests, real))
        loop = Loop(model, memory, shape.piece, mesh)
        end = loop.run(params, state, jnp.int32(UNBOUNDED), version).requests
        return end.tokens, end.count, end.logprob, end.model_logprob, end.finish, end.version

    whole, split = PartitionSpec(), PartitionSpec("data")
    knobs = jax.tree.map(lambda knob: whole if knob.ndim == 0 else split, sampling.rows(rows))
    draw = over_data(draw, mesh, (whole, split, knobs, whole), split)
    tokens, count, logprob, model_logprob, finish, versions = draw(
        model.to_decode_layout(params, mesh), prompts, sampling.rows(rows), version
    )
    return Rollout(
        prompts=prompts,
        tokens=tokens,
        mask=jnp.arange(max_tokens)[None] < count[:, None],
        logprob=logprob,
        model_logprob=model_logprob,
        finished=finish == STOP,
        version=versions,
    )


def table(prompts: Prompts, sampling: Sampling, room: int) -> Requests:
    """Lay prompts out as requests."""
    rows, width = prompts.tokens.shape
    return dataclasses.replace(
        empty_requests(rows, width, room, sampling),
        prompt=jnp.asarray(prompts.tokens),
        length=jnp.asarray(prompts.length),
        sample_id=jnp.asarray(prompts.sample_id),
    )
