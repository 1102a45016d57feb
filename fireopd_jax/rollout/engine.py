"""Draw a batch of responses as one pure function of parameters and prompts.

    prompts -> table of requests -> `Loop.run` to its end -> Rollout

The rows are shared out over the `data` axis of the model's mesh, one loop a replica: a replica
whose responses are short does not wait at every step for the others. For requests that come and go,
budgets and streams there is `serving.Engine`, around the same loop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int32

from fireopd_jax.models.language_model import LanguageModel, Params
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import STOP, Requests, Shape, empty_requests, enqueue, initial
from fireopd_jax.types import Prompts, Rollout

Memory = Dense | Paged
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
    memory: Memory = DENSE,
) -> Rollout:
    """Draw one response to each prompt.

    `max_tokens` is the room, static; `sampling.max_tokens` the limit, traced, at most the room. A
    row of length 0 draws nothing. Rows end on a stop token, which is part of the response, at the
    limit, or before a token for which the logits are not finite. At most `slots` rows are decoded
    at a time, on each replica; rows that follow one another with the same prompt share its prefill.
    """
    replicas = 1 if model.mesh is None else model.mesh.shape["data"]
    rows, width = prompts.tokens.shape
    shape = Shape.of(rows // replicas, width, max_tokens, slots, memory.align)

    def draw(params: Params, prompts: Prompts, sampling: Sampling, version: Array):
        requests = table(prompts, sampling, max_tokens)
        count = requests.length.shape[0]
        cache = memory.init(model.config, shape.slots, shape.entries, shape.capacity)
        state = initial(requests, shape.slots, shape.entries, cache)
        real = jnp.where(requests.length > 0, jnp.arange(count, dtype=jnp.int32), count)
        state = dataclasses.replace(state, ring=enqueue(state.ring, requests, real))
        loop = Loop(model, memory, shape.piece)
        end = loop.run(params, state, jnp.int32(UNBOUNDED), version).requests
        return end.tokens, end.count, end.logprob, end.model_logprob, end.finish, end.version

    whole, split = PartitionSpec(), PartitionSpec("data")
    knobs = jax.tree.map(lambda knob: whole if knob.ndim == 0 else split, sampling.rows(rows))
    draw = over_data(draw, model.mesh, (whole, split, knobs, whole), split)
    tokens, count, logprob, model_logprob, finish, versions = draw(
        model.relay(params), prompts, sampling.rows(rows), version
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


def over_data(
    function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Run a function once a replica, each on its own rows; other axes stay the compiler's."""
    if mesh is None or mesh.size == 1:
        return function
    # The loops of the replicas end at different times, which no check of their values can see.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"data"},
        check_vma=False,
    )
