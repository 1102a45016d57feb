"""Per-token statistics of softmax(scale * cap(hidden @ head.T)), without its logits.

    hidden [*N, D], head [V, D], ids [*N] -> logprob, entropy, logsumexp [*N]     head_stats
        ... and the K most probable ids, without gradient: the teacher's side     head_topk
        ... and log-probabilities at given ids, with gradient: the student's side head_gather

One contract, several implementations: `None` picks, a name is obeyed or refused. This module knows
nothing of rows, masks or prompts; it checks what it is given and flattens the leading axes.

A NaN or infinite state spoils its own row and no other: statistics there are NaN, ids stay within
[-1, V). A NaN in the head spoils every row, for every row reads all of it. The gradient of the head
sums over rows, so a spoilt row must have zero cotangents, as a masked token does.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops import chunked, reference
from fireopd_jax.ops.logits import Settings
from fireopd_jax.types import Array, pytree

LARGEST_K = 128
CHUNKS = (2048, 8192)
"""Columns at a time, least and most; a power of two between, by `default_chunk`."""
CHUNK_ELEMENTS = 2**22
"""Above these a chunk shrinks: 16 MiB of float32."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """The two functions behind a name, over flat tokens; see `reference` for both contracts."""

    statistics: Callable[..., tuple[Array, Array, Array, Array]]
    """Differentiable to hidden and head."""
    top_k: Callable[..., tuple[Array, Array, Array, Array, Array]]


IMPLEMENTATIONS = {
    "reference": Implementation(reference.statistics, reference.top_k),
    "chunked": Implementation(chunked.statistics, chunked.top_k),
}


@pytree
class HeadStats:
    """What a model says of one token id per position, in nats."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    """Over the whole vocabulary."""
    logsumexp: Float32[Array, "*N"]
    """Of the scaled logits."""


@pytree
class HeadTopK:
    """The same, and the K most probable ids, in falling order, of equals the lowest id first."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    logsumexp: Float32[Array, "*N"]
    top_ids: Int32[Array, "*N K"]
    """-1 where fewer than K ids have a probability above 0."""
    top_logprob: Float32[Array, "*N K"]


@pytree
class HeadGather:
    """The same, and the log-probabilities of a support, in its order."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    logsumexp: Float32[Array, "*N"]
    support_logprob: Float32[Array, "*N K"]


def head_stats(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "*N"],
    *,
    logit_scale: float | Float32[Array, ""] = 1.0,
    softcap: float | None = None,
    valid: int | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> HeadStats:
    """Return log p(ids), H(p) and log-sum-exp, p = softmax(logit_scale * cap(hidden @ head.T)).

    Differentiable to `hidden` and `head` through all three. The scale (one over the temperature) is
    traced, so a new value compiles nothing; its own gradient is zero by definition. Everything is
    float32, the gradients' matrix products excepted, which take operands of the inputs' type. An
    id outside the vocabulary has log-probability -inf.

    `softcap` c bends the model's logits before they are scaled: cap(x) = c tanh(x / c). Only the
    first `valid` rows of the head exist, the rest pads it: no probability, no gradient. Both are
    fixed in a compilation.

    `chunk` columns of logits exist at a time: 8192 by default, fewer (at least 2048) for more than
    512 tokens or a width above 512. `None` picks "chunked"; where the vocabulary is no larger than
    the chunk it is one chunk, so "reference" would gain nothing there either, and serves the tests.
    """
    chosen = _choose(implementation)
    _check(hidden, head, ids)
    settings = _settings(head, ids, softcap, valid, chunk)
    nowhere = jnp.zeros((ids.size, 0), jnp.int32)
    flat = _flatten(hidden, head, ids)
    values = chosen.statistics(*flat, nowhere, jnp.asarray(logit_scale, jnp.float32), settings)
    return HeadStats(*(jnp.reshape(value, ids.shape) for value in values[:3]))


def head_topk(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "*N"],
    *,
    k: int,
    logit_scale: float | Float32[Array, ""] = 1.0,
    softcap: float | None = None,
    valid: int | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> HeadTopK:
    """Return what `head_stats` does and the exact top-`k`, 1 to 128; nothing has a gradient.

    Ties fall as in `lax.top_k`: the lower id first. Equal logits are equal bits: columns that equal
    each other only in exact arithmetic may round apart. Other options as in `head_stats`.
    """
    chosen = _choose(implementation)
    _check(hidden, head, ids)
    if not 1 <= k <= LARGEST_K:
        raise ValueError(f"k must be 1 to {LARGEST_K}, got {k}")
    settings = dataclasses.replace(_settings(head, ids, softcap, valid, chunk), k=k)
    flat = lax.stop_gradient(_flatten(hidden, head, ids))
    scale = lax.stop_gradient(jnp.asarray(logit_scale, jnp.float32))
    *values, top_ids, top_logprob = chosen.top_k(*flat, scale, settings)
    logprob, entropy, logsumexp = (jnp.reshape(value, ids.shape) for value in values)
    top_ids, top_logprob = (jnp.reshape(x, (*ids.shape, k)) for x in (top_ids, top_logprob))
    return HeadTopK(logprob, entropy, logsumexp, top_ids, top_logprob)


def head_gather(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "*N"],
    support_ids: Int32[Array, "*N K"],
    *,
    logit_scale: float | Float32[Array, ""] = 1.0,
    softcap: float | None = None,
    valid: int | None = None,
    implementation: str | None = None,
    chunk: int | None = None,
) -> HeadGather:
    """Return what `head_stats` does and log p(support_ids), differentiable through all four.

    A support may name an id twice, or the id itself: gradients add. An id outside the vocabulary,
    such as the -1 of `head_topk`, is padding: log-probability -inf, and no gradient, whatever the
    cotangent. Other options as in `head_stats`.
    """
    chosen = _choose(implementation)
    _check(hidden, head, ids, support_ids)
    settings = _settings(head, ids, softcap, valid, chunk)
    support = jnp.reshape(support_ids, (ids.size, support_ids.shape[-1]))
    flat = _flatten(hidden, head, ids)
    *values, at_support = chosen.statistics(
        *flat, support, jnp.asarray(logit_scale, jnp.float32), settings
    )
    logprob, entropy, logsumexp = (jnp.reshape(value, ids.shape) for value in values)
    return HeadGather(logprob, entropy, logsumexp, jnp.reshape(at_support, support_ids.shape))


def _choose(name: str | None) -> Implementation:
    name = name or "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown head implementation {name!r}; known: {', '.join(sorted(IMPLEMENTATIONS))}"
        )
    return IMPLEMENTATIONS[name]


def default_chunk(tokens: int, width: int) -> int:
    """Halve the widest chunk until its logits and its rows of d head fit, down to the narrowest."""
    narrowest, chunk = CHUNKS
    while chunk > narrowest and chunk * max(tokens, width) > CHUNK_ELEMENTS:
        chunk //= 2
    return chunk


def _settings(
    head: Array, ids: Array, softcap: float | None, valid: int | None, chunk: int | None
) -> Settings:
    vocabulary = head.shape[0]
    chunk = default_chunk(ids.size, head.shape[1]) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    columns = int(vocabulary if valid is None else valid)
    if not 1 <= columns <= vocabulary:
        raise ValueError(f"valid must be 1 to the {vocabulary} rows of head, got {columns}")
    return Settings(columns, chunk, softcap)


def _check(hidden: Array, head: Array, ids: Array, support_ids: Array | None = None) -> None:
    """Refuse arrays that do not fit, naming the argument and both shapes."""
    for name, array in (("hidden", hidden), ("head", head)):
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} must be {' or '.join(DTYPES)}, got {array.dtype.name}")
    for name, array in (("ids", ids), ("support_ids", support_ids)):
        if array is not None and array.dtype != jnp.int32:
            raise TypeError(f"{name} must be int32, got {array.dtype.name}")
    of_hidden = f"hidden of shape {tuple(hidden.shape)}"
    if hidden.ndim < 1 or ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} must have the leading axes of {of_hidden}"
        )
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        turned = head.ndim == 2 and head.shape[0] == hidden.shape[-1]
        hint = "; pass head.T" if turned else ""
        raise ValueError(
            f"head of shape {tuple(head.shape)} must be [V, D], D the last axis of {of_hidden}"
            + hint
        )
    if support_ids is not None and (
        support_ids.ndim != ids.ndim + 1 or support_ids.shape[:-1] != ids.shape
    ):
        raise ValueError(
            f"support_ids of shape {tuple(support_ids.shape)} must have the axes of ids of shape "
            f"{tuple(ids.shape)} and one more"
        )


def _flatten(hidden: Array, head: Array, ids: Array) -> tuple[Array, Array, Array]:
    return (
        jnp.reshape(hidden, (ids.size, hidden.shape[-1])),
        jnp.asarray(head),
        jnp.reshape(ids, (ids.size,)),
    )
