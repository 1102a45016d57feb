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
from fireopd_jax.ops.logits import HeadSettings, HeadSharding
from fireopd_jax.ops.partials import student_factor
from fireopd_jax.types import Array, pytree

LARGEST_K = 128


class HeadOptions(TypedDict, total=False):
    """Options that all three functions take."""

    logit_scale: float | Float32[Array, ""]
    """One over the temperature. Traced, so a new value compiles nothing; it has no gradient."""
    softcap: float | None
    """c bends the model's logits before they are scaled: cap(x) = c tanh(x / c)."""
    valid: int | None
    """Only the first `valid` words of the head exist, the rest pads it: no probability, no
    gradient."""
    head_layout: Literal["vd", "dv"]
    """`vd`, one row a word, is the default, and the faster one; `dv` is its transpose."""
    sharding: HeadSharding | None
    """Mesh axes over which tokens and vocabulary are split; the statistics are those of the whole.
    Programs over several devices need it: without, a kernel would gather its operands."""
    implementation: str | None
    """Of `IMPLEMENTATIONS`; None picks by platform and shape, see `dispatch`."""
    chunk: int | None
    """Columns of logits at a time, in `chunked` and in every gradient; see `default_chunk`."""
    blocks: Blocks | None
    """Block sizes of a kernel; by its own formula."""
    interpret: bool
    """Run a kernel on a CPU, in the slow interpreter of its platform: for tests."""


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
    weight: Float32[Array, "*N"] | None
    """FiRe-OPD's token weight, where the student's entropy is given."""


@pytree
class HeadGather:
    """The same, and the log-probabilities of a support, in its order."""

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

    Differentiable to `hidden` and `head` through all three. Everything is float32, the gradients'
    matrix products excepted, which take operands of the inputs' type. An id outside the vocabulary
    has log-probability -inf. Options: `HeadOptions`; those that are no arrays are fixed in a
    compilation.
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
    """Return what `head_stats` does and log p(support_ids), differentiable through all four.

    A support may name an id twice, or the id itself: gradients add. An id outside the vocabulary,
    such as the -1 of `head_topk`, is padding: log-probability -inf, and no gradient, whatever the
    cotangent.
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
    """Return what `head_stats` does and the exact top-`k`, 1 to 128; nothing has a gradient.

    Ties fall as in `lax.top_k`: the lower id first. Equal logits are equal bits: columns that equal
    each other only in exact arithmetic may round apart.

    With `student_entropy` also the token weight of FiRe-OPD (arXiv 2606.02684, Eq. 5-7) with log V
    in place of both maxima, w = (1 + alpha (1 - H / log V)) (1 + beta H^S / log V), from the same
    pass: a kernel computes it in its last step. Weights by the maxima of a batch need the whole
    batch first; `reweighting` makes them of the entropies.
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
    """Check everything, flatten the leading axes, and gather what a compilation is fixed to."""
    check_options(options, IMPLEMENTATIONS, HeadOptions.__optional_keys__)
    transposed = options.get("head_layout", "vd") == "dv"
    check_arrays(hidden, head, ids, support_ids, transposed)
    sharding = options.get("sharding")
    vocabulary = head.shape[int(transposed)]
    check_sharding(sharding, vocabulary)
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
    flat = (_flat(hidden, ids, settings), jnp.asarray(head), _flat(ids, ids, settings))
    inputs = (*flat, _flat(support_ids, ids, settings), scale)
    check_supported(settings, *flat[:2], support_ids.shape[-1])
    return inputs, settings


def _flat(array: Array, ids: Array, settings: HeadSettings) -> Array:
    """Flatten the leading axes, and fill up to a share for each device."""
    flat = jnp.reshape(array, (ids.size, *array.shape[ids.ndim :]))
    shards = settings.sharding.token_shards if settings.sharding else 1
    missing = -ids.size % shards
    return jnp.pad(flat, ((0, missing), *((0, 0) for _ in flat.shape[1:]))) if missing else flat


def _restored(value: Array, ids: Array) -> Array:
    return jnp.reshape(value[: ids.size], (*ids.shape, *value.shape[1:]))
