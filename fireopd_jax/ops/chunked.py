"""Head statistics by a scan over vocabulary chunks, on any platform; and everyone's gradient.

    forward   each chunk of logits [N, C] folds into the State of its tokens
    backward  each chunk is computed again and gives its share of d hidden, and its rows of d head

No array of size [N, V] exists, forward or backward. A vocabulary of 151936 = 2^7 * 1187 has no good
divisor, so full chunks are scanned and the rest is one static step.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.ops import topk
from fireopd_jax.ops.logits import Settings, dot, logits, rows_of
from fireopd_jax.ops.state import LOWEST, State, with_weight
from fireopd_jax.types import Array


def forward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N S"],
    scale: Float32[Array, ""],
    limit: Int32[Array, ""] | None,
    settings: Settings,
    weigh: tuple[Array, Array] | None = None,
) -> State:
    """Fold all chunks into one state; see `state.Forward`."""

    def step(carry, first, width):
        m, s, t, picked, support, best = carry
        z, _ = _existing(hidden, rows_of(head, first, width, settings), first, scale, limit, settings)
        top = jnp.maximum(m, z.max(axis=1))
        u = z - top[:, None]
        p = jnp.exp(u)
        d = m - top
        decay = jnp.exp(d)
        tilted = jnp.where(u > -jnp.inf, u, 0.0) * p
        t = decay * (t + d * s) + tilted.sum(axis=1)
        s = decay * s + p.sum(axis=1)
        found = (ids >= first) & (ids < first + width)
        value = jnp.where(_is_id(ids, first, width), z, 0.0).sum(axis=1)
        picked = jnp.where(found, value, picked)
        # K compares of every logit would cost more than reading K of them.
        if support_ids.shape[1]:
            at = jnp.clip(support_ids - first, 0, width - 1)
            inside = (support_ids >= first) & (support_ids < first + width)
            support = jnp.where(inside, jnp.take_along_axis(z, at, axis=1), support)
        if settings.k:
            best = topk.update(best, z, first)
        return top, s, t, picked, support, best

    zero = jnp.zeros(ids.shape, jnp.float32)
    nothing = jnp.full(support_ids.shape, -jnp.inf, jnp.float32)
    best = topk.empty(ids.shape[0], settings.k)
    start = (zero + LOWEST, zero, zero, zero - jnp.inf, nothing, best)
    m, s, t, picked, support, (values, found) = _over_vocabulary(step, start, settings)
    found = jnp.where(values == -jnp.inf, -1, found)
    state = State(m, s, t, picked, support, values, found)
    return with_weight(state, weigh, settings.vocabulary)


def backward(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N S"],
    scale: Float32[Array, ""],
    limit: Int32[Array, ""] | None,
    settings: Settings,
    statistics: tuple[Array, Array, Array],
    cotangents: tuple[Array, Array, Array, Array],
    dtype: DTypeLike,
) -> tuple[Float32[Array, "N D"], Array]:
    """Return d hidden, and d head in `dtype`; both are sums over these tokens and columns.

    `statistics` are (m, log s, H) of each token over the whole vocabulary, `cotangents` those of
    log-probability, entropy, log-sum-exp and of the support.

    d/dz = p (c0 + c1 log p) + the ids' own cotangents. From dH/dz = -p (log p + H):
    c1 = -to_entropy, c0 = to_lse - to_logprob - to_entropy H, less all that goes to the support.
    An id that stands in the support twice collects both.
    """
    m, log_s, entropy = statistics
    to_logprob, to_entropy, to_logsumexp, to_support = cotangents
    # A token nobody asks about must not turn the whole of d head into NaN by its 0 * NaN.
    asked = (to_logprob != 0) | (to_entropy != 0) | (to_logsumexp != 0)
    asked = asked | (to_support != 0).any(axis=1)
    state = jnp.where(asked[:, None], hidden, 0)
    c1 = -to_entropy
    # A zero cotangent of a non-finite entropy is zero, too.
    c0 = to_logsumexp - to_logprob - jnp.where(to_entropy != 0, to_entropy * entropy, 0.0)
    c0 = c0 - to_support.sum(axis=1)
    operand = jnp.promote_types(hidden.dtype, head.dtype)
    tokens = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]

    def step(carry, first, width):
        d_hidden, d_head = carry
        rows = rows_of(head, first, width, settings)
        z, slope = _existing(hidden, rows, first, scale, limit, settings)
        logp = (z - m[:, None]) - log_s[:, None]
        finite = jnp.where(logp > -jnp.inf, logp, 0.0)
        d_z = jnp.exp(logp) * (c0[:, None] + c1[:, None] * finite)
        d_z = d_z + jnp.where(_is_id(ids, first, width), to_logprob[:, None], 0.0)
        if support_ids.shape[1]:
            inside = (support_ids >= first) & (support_ids < first + width)
            at = jnp.where(inside, support_ids - first, width)
            d_z = d_z.at[tokens, at].add(to_support, mode="drop")
        d_x = jnp.where(asked[:, None], d_z * slope, 0.0).astype(operand)
        d_hidden = d_hidden + dot(d_x, rows, (1, 0))
        d_rows = dot(state, d_x, (0, 0)) if settings.turned else dot(d_x, state, (0, 0))
        # Each row of d head is complete in one product: written in place, rounded once.
        d_head = lax.dynamic_update_slice_in_dim(
            d_head, d_rows.astype(dtype), first, axis=int(settings.turned)
        )
        return d_hidden, d_head

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, dtype))
    return _over_vocabulary(step, start, settings)


def _over_vocabulary(step: Callable[..., Any], carry: Any, settings: Settings) -> Any:
    """Apply `step(carry, first, width)` to all columns that exist, in order."""
    width = min(settings.chunk, settings.vocabulary)
    full, rest = divmod(settings.vocabulary, width)

    def body(carry, index):
        return step(carry, index * width, width), None

    carry, _ = lax.scan(body, carry, jnp.arange(full, dtype=jnp.int32))
    return step(carry, full * width, rest) if rest else carry


def _existing(
    hidden: Array,
    rows: Array,
    first: Array | int,
    scale: Array,
    limit: Array | None,
    settings: Settings,
) -> tuple[Array, Array]:
    """Return the logits of a chunk, -inf from column `limit` on, and their slope."""
    z, slope = logits(hidden, rows, scale, settings.softcap)
    if limit is None:
        return z, slope
    columns = first + jnp.arange(rows.shape[0], dtype=jnp.int32)
    return jnp.where((columns < limit)[None, :], z, -jnp.inf), slope


def _is_id(ids: Array, first: Array | int, width: int) -> Bool[Array, "N C"]:
    """Mark each token's id among the columns [first, first + width).

    A compare fuses into the pass over the chunk; a gather or scatter would be one more.
    """
    return (ids - first)[:, None] == jnp.arange(width, dtype=jnp.int32)[None, :]
