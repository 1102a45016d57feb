"""Head statistics by a scan over vocabulary chunks, on any platform, and their gradient.

    forward   each chunk of logits [N, C] is folded into the HeadPartials of its tokens
    backward  each chunk of logits is recomputed; it adds to d hidden and writes its rows of d head

No array of size [N, V] exists, forward or backward. The backward pass serves every implementation
but `reference`. A vocabulary such as 151936 = 2^7 * 1187 has no convenient divisor, so full chunks
are scanned and the remainder is one more step of another static size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.ops import topk
from fireopd_jax.ops.logits import HeadSettings, dot, head_rows, logits
from fireopd_jax.ops.partials import LOWEST, HeadPartials, with_weight
from fireopd_jax.types import Array


def forward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N S"],
    scale: Float32[Array, ""],
    limit: Int32[Array, ""] | None,
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None = None,
) -> HeadPartials:
    """Return the partials of all N tokens over the columns of `head`; see `partials.Forward`."""
    wanted = jnp.concatenate([ids[:, None], support_ids], axis=1)

    def step(carry, first, width):
        rows = head_rows(head, first, width, settings)
        z, _ = chunk_logits(hidden, rows, first, scale, limit, settings)
        sums, picked, best = carry
        at = jnp.clip(wanted - first, 0, width - 1)
        inside = (wanted >= first) & (wanted < first + width)
        # Cheaper than comparing the index of every logit with the ids.
        picked = jnp.where(inside, jnp.take_along_axis(z, at, axis=1), picked)
        best = topk.update(best, z, first) if settings.k else best
        return fold(sums, z), picked, best

    nothing = jnp.full(wanted.shape, -jnp.inf, jnp.float32)
    start = (empty(ids.shape[0]), nothing, topk.empty(ids.shape[0], settings.k))
    (m, s, t), picked, (values, found) = scan_chunks(step, start, settings, settings.chunk)
    found = jnp.where(values == -jnp.inf, -1, found)
    partials = HeadPartials(m, s, t, picked[:, 0], picked[:, 1:], values, found)
    return with_weight(partials, weight_inputs, settings.vocabulary)


def backward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N S"],
    scale: Float32[Array, ""],
    limit: Int32[Array, ""] | None,
    settings: HeadSettings,
    statistics: tuple[Array, Array, Array],
    cotangents: tuple[Array, Array, Array, Array],
    dtype: DTypeLike,
) -> tuple[Float32[Array, "N D"], Array]:
    """Return d hidden in float32 and d head in `dtype`, summed over these tokens and columns.

    `statistics` are (m, log s, H) of each token over the whole vocabulary, `cotangents` those of
    log-probability, entropy, log-sum-exp ([N] each) and of the support's log-probabilities [N, S].
    """
    to_d_z = gradient_of_logits(ids, support_ids, statistics, cotangents)
    # A masked token may be NaN, and 0 * NaN would make the whole of d head NaN.
    used = has_cotangent(cotangents)[:, None]
    used_hidden = jnp.where(used, hidden, 0)
    operand = jnp.promote_types(hidden.dtype, head.dtype)

    def step(carry, first, width):
        d_hidden, d_head = carry
        rows = head_rows(head, first, width, settings)
        z, slope = chunk_logits(hidden, rows, first, scale, limit, settings)
        d_x = jnp.where(used, to_d_z(z, first) * slope, 0.0).astype(operand)
        d_hidden = d_hidden + dot(d_x, rows, (1, 0))
        d_rows = rows_gradient(used_hidden, d_x, settings)
        # One product computes each row of d head completely: write in place, round once.
        d_head = lax.dynamic_update_slice_in_dim(
            d_head, d_rows.astype(dtype), first, axis=int(settings.transposed)
        )
        return d_hidden, d_head

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, dtype))
    return scan_chunks(step, start, settings, settings.backward_chunk or settings.chunk)


def empty(tokens: int) -> tuple[Array, Array, Array]:
    """Return (m, s, t) of each token over no columns."""
    zero = jnp.zeros((tokens,), jnp.float32)
    return zero + LOWEST, zero, zero


def fold(sums: Sequence[Array], z: Float32[Array, "N C"]) -> tuple[Array, Array, Array]:
    """Return (m, s, t) updated with the logits `z` of more columns."""
    m, s, t = sums
    top = jnp.maximum(m, z.max(axis=1))
    # Finite: 0 * -inf would be NaN where p is 0.
    u = jnp.maximum(z - top[:, None], LOWEST)
    p = jnp.exp(u)
    gap = m - top
    decay = jnp.exp(gap)
    return top, decay * s + p.sum(axis=1), decay * (t + gap * s) + (p * u).sum(axis=1)


def has_cotangent(cotangents: Sequence[Array]) -> Bool[Array, " N"]:
    """Return the mask of the tokens that have any non-zero cotangent."""
    to_logprob, to_entropy, to_logsumexp, to_support = cotangents
    used = (to_logprob != 0) | (to_entropy != 0) | (to_logsumexp != 0)
    return used | (to_support != 0).any(axis=1)


def gradient_of_logits(
    ids: Array, support_ids: Array, statistics: Sequence[Array], cotangents: Sequence[Array]
) -> Callable[[Array, Array | int], Array]:
    """Return the function that maps logits z [N, C] and their first column to d z.

    With p = softmax(z): d z = p (c0 + c1 log p) + the cotangents of the ids. From dH/dz = -p (log p
    + H): c1 = -to_entropy and c0 = to_logsumexp - to_logprob - to_entropy H - sum to_support. An id
    that occurs twice in the support collects both cotangents.
    """
    m, log_s, entropy = statistics
    to_logprob, to_entropy, to_logsumexp, to_support = cotangents
    c1 = -to_entropy
    # 0 * H must be 0 also where H is not finite.
    c0 = to_logsumexp - to_logprob - jnp.where(to_entropy != 0, to_entropy * entropy, 0.0)
    c0 = c0 - to_support.sum(axis=1)
    tokens = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]

    def d_logits(z: Array, first: Array | int) -> Array:
        width = z.shape[1]
        logp = (z - m[:, None]) - log_s[:, None]
        finite = jnp.maximum(logp, LOWEST)
        d_z = jnp.exp(logp) * (c0[:, None] + c1[:, None] * finite)
        is_id = (ids - first)[:, None] == jnp.arange(width, dtype=jnp.int32)[None, :]
        d_z = d_z + jnp.where(is_id, to_logprob[:, None], 0.0)
        if not support_ids.shape[1]:
            return d_z
        inside = (support_ids >= first) & (support_ids < first + width)
        at = jnp.where(inside, support_ids - first, width)
        return d_z.at[tokens, at].add(to_support, mode="drop")

    return d_logits


def rows_gradient(hidden: Array, d_x: Array, settings: HeadSettings) -> Array:
    """Return d x^T hidden, the gradient of a chunk of the head, in the layout of the head."""
    return dot(hidden, d_x, (0, 0)) if settings.transposed else dot(d_x, hidden, (0, 0))


def scan_chunks(step: Callable[..., Any], carry: Any, settings: HeadSettings, chunk: int) -> Any:
    """Return `carry` after `step(carry, first, width)` over all columns, in order.

    `width` is `chunk`, or less for the last columns.
    """
    width = min(chunk, settings.vocabulary)
    full, rest = divmod(settings.vocabulary, width)

    def body(carry, index):
        return step(carry, index * width, width), None

    carry, _ = lax.scan(body, carry, jnp.arange(full, dtype=jnp.int32))
    return step(carry, full * width, rest) if rest else carry


def chunk_logits(
    hidden: Array,
    rows: Array,
    first: Array | int,
    scale: Array,
    limit: Array | None,
    settings: HeadSettings,
) -> tuple[Array, Array]:
    """Return the logits of a chunk, -inf from column `limit` on, and their slope."""
    z, slope = logits(hidden, rows, scale, settings.softcap)
    if limit is None:
        return z, slope
    columns = first + jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where((columns < limit)[None, :], z, -jnp.inf), slope
