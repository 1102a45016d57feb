"""Per-token statistics of softmax(scale * cap(hidden @ head.T)), without its logits.

    hidden [*N, D], head [V, D], ids [*N] -> logprob, entropy, logsumexp [*N]     head_stats
        ... and the K most probable ids, without gradient (teacher)               head_topk
        ... and log-probabilities at given ids, with gradient (student)           head_gather

All implementations return the same. `implementation=None` chooses one; a named one runs or raises.
Arguments are checked, and the leading axes flattened; masks are the caller's.

NaN or infinity in the hidden state of a token makes the statistics of that token NaN, and its ids
stay within [-1, V); other tokens are not affected. NaN in the head reaches every token. The
gradient of the head sums over tokens, so a token with NaN needs cotangents of 0, as a masked token
has.
"""

from typing import Literal, TypedDict, Unpack

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops import fused, reference
from fireopd_jax.ops.blocks import Blocks, default_chunk
from fireopd_jax.ops.checks import (
    check_arrays,
    check_entropy,
    check_options,
    check_sharding,
    check_valid,
)
from fireopd_jax.ops.dispatch import FORWARDS, IMPLEMENTATIONS, PLAIN, check_supported
from fireopd_jax.ops.logits import HeadSettings, HeadSharding, with_rows
from fireopd_jax.ops.partials import student_factor
from fireopd_jax.types import Array, pytree

LARGEST_K = 128


class HeadOptions(TypedDict, total=False):
    """Options of all head functions."""

    logit_scale: float | Float32[Array, ""]
    """1 / temperature. Traced, so a new value does not recompile; without gradient."""
    softcap: float | None
    """c of cap(x) = c tanh(x / c), applied to the model's logits before the scale; None: no cap."""
    valid: int | None
    """Vocabulary size without padding: later rows of the head have probability and gradient 0."""
    head_layout: Literal["vd", "dv"]
    """`vd` (default, and faster): head is [V, D]; `dv`: head is [D, V]."""
    sharding: HeadSharding | None
    """Mesh axes over which tokens and vocabulary are sharded; the statistics are those of the
    whole. Programs over several devices need it: without it a kernel would gather its operands.
    """
    implementation: str | None
    """One of `IMPLEMENTATIONS`; None chooses by platform and shape, see `dispatch`."""
    chunk: int | None
    """Vocabulary columns at a time, in `chunked` and in every gradient; see `default_chunk`."""
    blocks: Blocks | None
    """Block sizes of a kernel; None means its own default."""
    interpret: bool
    """Run a kernel on a CPU, in the slow interpreter of its platform; for tests."""


@pytree
class HeadStats:
    """Statistics of each position, in nats, from the distribution over the whole vocabulary."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    """H = -sum_v p log p"""
    logsumexp: Float32[Array, "*N"]
    """log sum_v exp(z_v) of the scaled logits z"""


@pytree
class HeadTopK:
    """`HeadStats` and the K most probable token ids."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    logsumexp: Float32[Array, "*N"]
    top_ids: Int32[Array, "*N K"]
    """In order of falling probability, of equals the lowest id first; -1 where fewer than K ids
    have probability above 0.
    """
    top_logprob: Float32[Array, "*N K"]
    weight: Float32[Array, "*N"] | None
    """FiRe-OPD's token weight; None without `student_entropy`."""


@pytree
class HeadGather:
    """`HeadStats` and the log-probabilities at the support, in its order."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    logsumexp: Float32[Array, "*N"]
    support_logprob: Float32[Array, "*N K"]


def head_stats(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, "*N"],
    **options: Unpack[HeadOptions],
) -> HeadStats:
    """Return log p(ids), H(p) and log-sum-exp, p = softmax(logit_scale * cap(hidden @ head.T)).

    Differentiable in `hidden` and `head` through all three. `hidden` and `head` are bfloat16,
    float16 or float32; the results are float32. Matrix products accumulate in float32; their
    operands, the gradient of the logits among them, have the dtype of the inputs. An id outside [0,
    valid) has log-probability -inf. Options (`HeadOptions`) that are not arrays are static under
    jit.

    Raises TypeError for a wrong dtype or unknown option, ValueError for shapes or options that do
    not fit.
    """
    no_support = jnp.zeros((*ids.shape, 0), jnp.int32)
    values = _statistics(hidden, head, ids, no_support, options)
    return HeadStats(*values[:3])


def head_gather(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, "*N"],
    support_ids: Int32[Array, "*N K"],
    **options: Unpack[HeadOptions],
) -> HeadGather:
    """Return `head_stats` and log p(support_ids), differentiable through all four.

    A support may contain an id twice, or the sampled id: their gradients add. An id outside [0,
    valid), such as the -1 of `head_topk`, is padding: its log-probability is -inf and its gradient
    0, whatever the cotangent. Raises as `head_stats`.
    """
    return HeadGather(*_statistics(hidden, head, ids, support_ids, options))


def head_topk(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, "*N"],
    *,
    k: int,
    student_entropy: Float32[Array, "*N"] | None = None,
    alpha: float | Float32[Array, ""] = 1.0,
    beta: float | Float32[Array, ""] = 1.0,
    **options: Unpack[HeadOptions],
) -> HeadTopK:
    """Return `head_stats` and the exact top-`k`, 1 <= k <= 128; nothing has a gradient.

    Ties are as in `lax.top_k`, the lowest id first, where equal means equal bits: columns that are
    equal only in exact arithmetic may be rounded differently.

    With `student_entropy` H^S also FiRe-OPD's token weight (arXiv 2606.02684, Eq. 5-7) with log V
    in place of both maxima, w = (1 + alpha (1 - H / log V)) (1 + beta H^S / log V), from the same
    pass over the head. Weights by the maxima of a batch need the entropies of the whole batch
    first; see `reweighting`. Raises as `head_stats`, and ValueError for `k` out of range.
    """
    if not 1 <= k <= LARGEST_K:
        raise ValueError(f"k must be 1 to {LARGEST_K}, got {k}")
    no_support = jnp.zeros((*ids.shape, 0), jnp.int32)
    (hidden, head, flat_ids, _, scale), settings = _prepare(
        hidden, head, ids, no_support, options, k
    )
    weight_inputs = None
    if student_entropy is not None:
        check_entropy(student_entropy, ids)
        factor = student_factor(_flat(student_entropy, ids, settings), beta, settings.vocabulary)
        weight_inputs = lax.stop_gradient((factor, jnp.asarray(alpha, jnp.float32)))
    hidden, head, scale = lax.stop_gradient((hidden, head, scale))
    if settings.implementation == PLAIN:
        *values, weight = reference.top_k(hidden, head, flat_ids, scale, settings, weight_inputs)
    else:
        forward = FORWARDS[settings.implementation]
        *values, weight = fused.top_k(
            forward, hidden, head, flat_ids, scale, settings, weight_inputs
        )
    logprob, entropy, logsumexp, top_ids, top_logprob = (_restored(each, ids) for each in values)
    weight = None if weight is None else _restored(weight, ids)
    return HeadTopK(logprob, entropy, logsumexp, top_ids, top_logprob, weight)


def _statistics(
    hidden: Array, head: Array, ids: Array, support_ids: Array, options: HeadOptions
) -> tuple[Array, Array, Array, Array]:
    inputs, settings = _prepare(hidden, head, ids, support_ids, options, k=0)
    if settings.implementation == PLAIN:
        values = reference.statistics(*inputs, settings)
    else:
        forward = FORWARDS[settings.implementation]
        values: tuple[Array, ...] = fused.statistics(forward, *inputs, settings)
    logprob, entropy, logsumexp, support = (_restored(each, ids) for each in values)
    return logprob, entropy, logsumexp, support


def _prepare(
    hidden: Array, head: Array, ids: Array, support_ids: Array, options: HeadOptions, k: int
) -> tuple[tuple[Array, Array, Array, Array, Array], HeadSettings]:
    """Return the checked, flattened inputs (with the scale) and the static settings."""
    check_options(options, IMPLEMENTATIONS, HeadOptions.__optional_keys__)
    transposed = options.get("head_layout", "vd") == "dv"
    check_arrays(hidden, head, ids, support_ids, transposed)
    sharding = options.get("sharding")
    vocabulary = head.shape[int(transposed)]
    check_sharding(sharding)
    tokens = -(-ids.size // (sharding.token_shards if sharding else 1))
    width = hidden.shape[-1]
    settings = HeadSettings(
        vocabulary=check_valid(options.get("valid"), vocabulary),
        chunk=options.get("chunk") or default_chunk(tokens, width, larger=k > 0),
        backward_chunk=options.get("chunk") or default_chunk(tokens, width, larger=True),
        softcap=options.get("softcap"),
        k=k,
        transposed=transposed,
        sharding=sharding,
        implementation=options.get("implementation"),
        blocks=options.get("blocks"),
        interpret=options.get("interpret", False),
    )
    scale = jnp.asarray(options.get("logit_scale", 1.0), jnp.float32)
    shards = sharding.vocabulary_shards if sharding else 1
    head = with_rows(jnp.asarray(head), vocabulary + -vocabulary % shards, transposed)
    flat = (_flat(hidden, ids, settings), head, _flat(ids, ids, settings))
    inputs = (*flat, _flat(support_ids, ids, settings), scale)
    check_supported(settings, *flat[:2], support_ids.shape[-1])
    return inputs, settings


def _flat(array: Array, ids: Array, settings: HeadSettings) -> Array:
    """Return `array` with flattened leading axes, padded to a multiple of the token shards."""
    flat = jnp.reshape(array, (ids.size, *array.shape[ids.ndim :]))
    multiple = settings.sharding.token_multiple if settings.sharding else 1
    missing = -ids.size % multiple
    return jnp.pad(flat, ((0, missing), *((0, 0) for _ in flat.shape[1:]))) if missing else flat


def _restored(value: Array, ids: Array) -> Array:
    return jnp.reshape(value[: ids.size], (*ids.shape, *value.shape[1:]))
