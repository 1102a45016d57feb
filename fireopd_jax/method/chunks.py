"""Audited chunks of responses: which tokens are audited, and the weight that each chunk gets.

    entropy -> select -> anchor i32[B, M] -> (the teacher continues each prefix) -> Audit
    Audit, log-probs -> prior, posterior -> Chunks

All functions have fixed shapes under jit. References: arXiv 2606.01476 (OmniOPD).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int32

from fireopd_jax.types import Array, Audit, Chunks

PAPER_CHUNKS, PAPER_SIZE = 10, 50
"""The paper's chunks per response, M, and tokens per chunk, C."""
SIZES_IN_RESPONSE, CHUNKS_IN_RESPONSE = 8, 2
"""A chunk is at most 1/8 of the longest response, all chunks together at most 1/2 of it."""


def chunk_sizes(max_tokens: int) -> tuple[int, int]:
    """Return (M, C): the paper's 10 chunks of 50 tokens, or what fits into shorter responses.

    C = min(50, max(1, T // 8)), M = min(10, max(1, T // (2 C))), T = `max_tokens`.
    """
    size = min(PAPER_SIZE, max(1, max_tokens // SIZES_IN_RESPONSE))
    return min(PAPER_CHUNKS, max(1, max_tokens // (CHUNKS_IN_RESPONSE * size))), size


def select(
    entropy: Float32[Array, "B T"], mask: Bool[Array, "B T"], num_chunks: int, size: int
) -> Int32[Array, "B M"]:
    """Return the anchors of the peak-entropy scheduler: ascending in each row, then -1.

    Greedily by descending entropy: t becomes the first token of a chunk of C = `size` tokens if the
    chunk fits into the response and overlaps none chosen before. Of equal entropies the later
    position comes first. A row gets fewer than M = `num_chunks` if no more fit, and none if it is
    shorter than C.

    `mask` must be true on a prefix of each row. An entropy that is not finite is no anchor.

    References: arXiv 2606.01476.
    """
    mask = jnp.asarray(mask)
    room = mask.shape[1]
    at = jnp.arange(room)[None]
    fits = at + size <= mask.sum(axis=1, keepdims=True)
    entropy = jnp.where(mask & jnp.isfinite(entropy), entropy, -jnp.inf)

    def choose(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        anchors, free = carry
        left = jnp.where(free, entropy, -jnp.inf)
        # argmax returns the first of equal values: of the reversed row, the last.
        peak = room - 1 - jnp.argmax(left[:, ::-1], axis=1)
        found = (left > -jnp.inf).any(axis=1)
        anchors = anchors.at[:, index].set(jnp.where(found, peak, room).astype(jnp.int32))
        near = found[:, None] & (jnp.abs(at - peak[:, None]) < size)
        return anchors, free & ~near

    none = jnp.full((mask.shape[0], num_chunks), room, jnp.int32)
    anchors, _ = lax.fori_loop(0, num_chunks, choose, (none, fits))
    anchors = jnp.sort(anchors, axis=1)
    return jnp.where(anchors < room, anchors, -1)


def members(audit: Audit, room: int) -> Bool[Array, "B M T"]:
    """Return the tokens of each audited chunk, in responses of `room` tokens.

    A chunk without a continuation, such as of a teacher that did not answer, is not audited.
    """
    anchor, length = jnp.asarray(audit.anchor)[..., None], jnp.asarray(audit.length)[..., None]
    real = (anchor >= 0) & (length > 0) & (jnp.asarray(audit.samples)[..., None] > 0)
    at = jnp.arange(room)[None, None]
    return jnp.asarray(real & (at >= anchor) & (at < anchor + length))


def prior(logprob: Float32[Array, "B T"], audit: Audit) -> Float32[Array, "B M"]:
    """Return each chunk's length-normalised probability, 0 where none is audited.

    pi-bar = (prod_t pi(y_t))^(1/C) = exp of the mean log-probability of its C tokens.
    """
    logprob = jnp.asarray(logprob)
    inside = members(audit, logprob.shape[1])
    count = inside.sum(axis=2)
    total = jnp.where(inside, logprob[:, None], 0.0).sum(axis=2)
    return jnp.where(count > 0, jnp.exp(total / jnp.maximum(count, 1)), 0.0)


def posterior(
    agreement: Float32[Array, "B M"],
    samples: Float32[Array, "B M"],
    prior: Float32[Array, "B M"],
    alpha: float,
) -> Float32[Array, "B M"]:
    """Return pi-hat = (k + alpha pi-bar) / (N + alpha), 0 where N is 0.

    Between alpha pi-bar / (N + alpha) and 1: the mean of a Dirichlet-multinomial model with k of N
    continuations agreeing and the student's own probability as the prior.

    References: arXiv 2606.01476.
    """
    samples = jnp.asarray(samples)
    total = jnp.where(samples > 0, samples + alpha, 1.0)
    return jnp.where(samples > 0, (agreement + alpha * prior) / total, 0.0)


def make_chunks(
    audit: Audit, logprob: Float32[Array, "B T"], group: Int32[Array, " B"], alpha: float
) -> Chunks:
    """Return the audited tokens with the target and the prior of their chunks; no gradient.

    `logprob` are the student's log-probabilities; `group` is equal for the responses to a prompt,
    whose other responses give a row's baseline.
    """
    own = prior(logprob, audit)
    target = posterior(audit.agreement, audit.samples, own, alpha)
    inside = members(audit, logprob.shape[1])
    real = inside.any(axis=2)

    def spread(value: Array) -> Array:
        return jnp.where(inside, value[..., None], 0.0).sum(axis=1)

    chunks = Chunks(
        audited=jnp.any(inside, axis=1),
        target=spread(target),
        prior=spread(own),
        baseline=_leave_one_out(jnp.where(real, target, 0.0).sum(axis=1), real.sum(axis=1), group),
    )
    return jax.lax.stop_gradient(chunks)


def _leave_one_out(
    total: Float32[Array, " B"], count: Int32[Array, " B"], group: Int32[Array, " B"]
) -> Float32[Array, " B"]:
    """Return the mean over the chunks of the group's other rows; 0 where they have none."""
    group = jnp.asarray(group)
    others = (group[:, None] == group[None]) & ~jnp.eye(len(group), dtype=bool)
    number = jnp.where(others, count[None], 0).sum(axis=1)
    value = jnp.where(others, total[None], 0.0).sum(axis=1)
    return jnp.where(number > 0, value / jnp.maximum(number, 1), 0.0)
