"""Generate a batch of responses in one jitted program: prefill, then decode to the last row's end.

Prompt tokens take the cache slots 0..P-1 and response token t the slot P + t of every row,
whatever the prompt's length: a write is one slice. The engine does not know what the responses
are for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.models.decoder import Cache, Decoder, Layer
from fireopd_jax.models.language_model import LanguageModel, Params, last_of_prompt
from fireopd_jax.rollout.sampling import Sampling, draw, row_keys
from fireopd_jax.types import Array, Prompts, Rollout, pytree


@pytree
class _State:
    step: Int32[Array, ""]
    hidden: Float32[Array, "B D"]
    cache: Cache
    active: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    tokens: Int32[Array, "B T"]
    mask: Bool[Array, "B T"]
    logprob: Float32[Array, "B T"]
    model_logprob: Float32[Array, "B T"]


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    sampling: Sampling,
    version: Int32[Array, ""],
    *,
    max_tokens: int,
) -> Rollout:
    """Draw one response to each prompt.

    `max_tokens` is the room, static; `sampling.max_tokens` the limit, traced, at most the room. A
    row of length 0 draws nothing. Rows end on a stop token, which is part of the response, or at
    the limit.
    """
    decoder = model.bind(params)
    layers = decoder.unstacked()
    head = decoder.head
    width = prompts.tokens.shape[1]
    start, visible = _prefill(decoder, layers, prompts, max_tokens)

    def alive(state: _State) -> Bool[Array, ""]:
        return (state.step < jnp.minimum(sampling.max_tokens, max_tokens)) & state.active.any()

    def decode(state: _State) -> _State:
        logits = jnp.einsum("bd,vd->bv", state.hidden.astype(head.dtype), head,
                            preferred_element_type=jnp.float32)  # fmt: skip
        logits = model.real(logits)
        keys = row_keys(sampling.seed, prompts.sample_id, state.step)
        drawn = draw(logits, keys, sampling, state.step)

        def write(buffer: Array, value: Array) -> Array:
            column = jnp.where(state.active, value, jnp.zeros_like(value))[:, None]
            return jax.lax.dynamic_update_slice_in_dim(buffer, column, state.step, axis=1)

        stopped = state.active & jnp.isin(drawn.token, sampling.stop)
        hidden, cache = decoder.extend(
            layers,
            drawn.token[:, None],
            (prompts.length + state.step)[:, None],
            visible,
            state.cache,
            width + state.step,
        )
        return _State(
            step=state.step + 1,
            hidden=hidden[:, 0].astype(jnp.float32),
            cache=cache,
            active=state.active & ~stopped,
            finished=state.finished | stopped,
            tokens=write(state.tokens, drawn.token),
            mask=write(state.mask, jnp.ones_like(state.active)),
            logprob=write(state.logprob, jnp.where(drawn.bad, jnp.nan, drawn.logprob)),
            model_logprob=write(
                state.model_logprob, jnp.where(drawn.bad, jnp.nan, drawn.model_logprob)
            ),
        )

    end = jax.lax.while_loop(alive, decode, start)
    return Rollout(
        prompts=prompts,
        tokens=end.tokens,
        mask=end.mask,
        logprob=end.logprob,
        model_logprob=end.model_logprob,
        finished=end.finished,
        version=jnp.where(end.mask, version, -1),
    )


def _prefill(
    decoder: Decoder, layers: list[Layer], prompts: Prompts, max_tokens: int
) -> tuple[_State, Bool[Array, "B S"]]:
    """Run the prompts into an empty cache; also tell which of its slots may ever be seen."""
    rows, width = prompts.tokens.shape
    slots = jnp.arange(width + max_tokens)[None]
    # Later response slots are hidden by causality.
    visible = (slots < prompts.length[:, None]) | (slots >= width)
    positions = jnp.broadcast_to(jnp.arange(width)[None], (rows, width))
    cache = decoder.empty_cache(rows, width + max_tokens)
    hidden, cache = decoder.extend(layers, prompts.tokens, positions, visible, cache, 0)
    zeros = jnp.zeros((rows, max_tokens), jnp.float32)
    state = _State(
        step=jnp.int32(0),
        hidden=last_of_prompt(hidden, prompts.length).astype(jnp.float32),
        cache=cache,
        active=prompts.length > 0,
        finished=jnp.zeros(rows, bool),
        tokens=zeros.astype(jnp.int32),
        mask=zeros.astype(bool),
        logprob=zeros,
        model_logprob=zeros,
    )
    return state, visible
