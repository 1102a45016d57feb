"""Head statistics by a scan over vocabulary chunks, on any platform.

    forward   each chunk of logits [N, C] folds into (max, sum, tilted sum, picked logits) per token
              and, where asked for, into its running list of the K largest
    backward  each chunk is computed again and gives its share of d hidden, and its rows of d head

No array of size [N, V] exists, forward or backward. A vocabulary of 151936 = 2^7 * 1187 has no good
divisor, so full chunks are scanned and the rest is one static step.

The state per token is m = max z, s = sum e^(z-m), t = sum (z-m) e^(z-m). Then H = log s - t/s, two
terms that are never negative: nothing cancels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Float32, Int32

from fireopd_jax.ops import topk
from fireopd_jax.ops.logits import Settings, dot, exists, logits
from fireopd_jax.types import Array

LOWEST = -1e30
"""Start of the running maximum: finite, because the update multiplies m - max by s = 0."""

Stats = Float32[Array, " N"]


def _rows(head: Array, first: Array | int, width: int) -> Array:
    return lax.dynamic_slice_in_dim(head, first, width, axis=0)


def _is_id(ids: Array, first: Array | int, width: int) -> Bool[Array, "N C"]:
    """Mark each token's id among the columns [first, first + width).

    A compare fuses into the pass over the chunk; a gather or scatter would be one more.
    """
    return (ids - first)[:, None] == jnp.arange(width, dtype=jnp.int32)[None, :]


def _over_vocabulary(step: Callable[..., Any], carry: Any, settings: Settings) -> Any:
    """Apply `step(carry, first, width)` to all columns that exist, in order."""
    width = min(settings.chunk, settings.vocabulary)
    full, rest = divmod(settings.vocabulary, width)

    def body(carry, index):
        return step(carry, index * width, width), None

    carry, _ = lax.scan(body, carry, jnp.arange(full, dtype=jnp.int32))
    return step(carry, full * width, rest) if rest else carry


def _forward(
    hidden: Array, head: Array, ids: Array, support_ids: Array, scale: Array, settings: Settings
):
    """Return each token's max m, log s, entropy, logit of its id, those at its support, top-K."""

    def step(carry, first, width):
        m, s, t, picked, support, best = carry
        z, _ = logits(hidden, _rows(head, first, width), scale, settings.softcap)
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
    m, s, t, picked, support, best = _over_vocabulary(step, start, settings)
    log_s = jnp.log(s)
    return m, log_s, log_s - t / s, picked, support, best


def statistics(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N K"],
    scale: Float32[Array, ""],
    settings: Settings,
) -> tuple[Stats, Stats, Stats, Float32[Array, "N K"]]:
    """Return log-probability, entropy, log-sum-exp and the log-probabilities at `support_ids`.

    No gradient to `scale`.
    """
    return _differentiable(hidden, head, ids, support_ids, scale, settings)


def top_k(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, " N"],
    scale: Float32[Array, ""],
    settings: Settings,
) -> tuple[Stats, Stats, Stats, Int32[Array, "N K"], Float32[Array, "N K"]]:
    """Return log-probability, entropy, log-sum-exp, and the K most probable ids with theirs."""
    no_support = jnp.zeros((ids.shape[0], 0), jnp.int32)
    m, log_s, entropy, picked, _, (values, found) = _forward(
        hidden, head, ids, no_support, scale, settings
    )
    found = jnp.where(values == -jnp.inf, -1, found)
    logprob, logsumexp = (picked - m) - log_s, m + log_s
    return logprob, entropy, logsumexp, found, (values - m[:, None]) - log_s[:, None]


def _statistics(hidden, head, ids, support_ids, scale, settings):
    return _with_residuals(hidden, head, ids, support_ids, scale, settings)[0]


def _with_residuals(hidden, head, ids, support_ids, scale, settings):
    m, log_s, entropy, picked, support, _ = _forward(
        hidden, head, ids, support_ids, scale, settings
    )
    # picked <= m and log s >= 0 hold exactly, hence logprob <= 0.
    logprob = (picked - m) - log_s
    # A padded id is impossible even in a row of NaN.
    known = exists(support_ids, settings.vocabulary)
    support = jnp.where(known, (support - m[:, None]) - log_s[:, None], -jnp.inf)
    stats = (logprob, entropy, m + log_s, support)
    return stats, (hidden, head, ids, support_ids, scale, m, log_s, entropy)


def _backward(settings, residuals, cotangents):
    """Accumulate the gradients, with d/dz = p (c0 + c1 log p) + the ids' own cotangents.

    From dH/dz = -p (log p + H): c1 = -to_entropy, c0 = to_lse - to_logprob - to_entropy H, less
    all that goes to the support. An id that stands in the support twice collects both.
    """
    hidden, head, ids, support_ids, scale, m, log_s, entropy = residuals
    to_logprob, to_entropy, to_logsumexp, to_support = cotangents
    to_support = jnp.where(exists(support_ids, settings.vocabulary), to_support, 0.0)
    # A token nobody asks about must not turn the whole of d head into NaN by its 0 * NaN.
    asked = (to_logprob != 0) | (to_entropy != 0) | (to_logsumexp != 0)
    asked = asked | (to_support != 0).any(axis=1)
    state = jnp.where(asked[:, None], hidden, 0)
    c1 = -to_entropy
    # A zero cotangent of a non-finite entropy is zero, too.
    c0 = to_logsumexp - to_logprob - jnp.where(to_entropy != 0, to_entropy * entropy, 0.0)
    c0 = c0 - to_support.sum(axis=1)
    dtype = jnp.promote_types(hidden.dtype, head.dtype)
    tokens = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]

    def step(carry, first, width):
        d_hidden, d_head = carry
        rows = _rows(head, first, width)
        z, slope = logits(hidden, rows, scale, settings.softcap)
        logp = (z - m[:, None]) - log_s[:, None]
        finite = jnp.where(logp > -jnp.inf, logp, 0.0)
        d_z = jnp.exp(logp) * (c0[:, None] + c1[:, None] * finite)
        d_z = d_z + jnp.where(_is_id(ids, first, width), to_logprob[:, None], 0.0)
        if support_ids.shape[1]:
            inside = (support_ids >= first) & (support_ids < first + width)
            at = jnp.where(inside, support_ids - first, width)
            d_z = d_z.at[tokens, at].add(to_support, mode="drop")
        d_x = jnp.where(asked[:, None], d_z * slope, 0.0).astype(dtype)
        d_hidden = d_hidden + dot(d_x, rows, (1, 0))
        d_rows = dot(d_x, state, (0, 0)).astype(head.dtype)
        # Each row of d head is complete in one product: written in place, rounded once.
        return d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_rows, first, axis=0)

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, head.dtype))
    d_hidden, d_head = _over_vocabulary(step, start, settings)
    return d_hidden.astype(hidden.dtype), d_head, None, None, None


_differentiable = jax.custom_vjp(_statistics, nondiff_argnums=(5,))
_differentiable.defvjp(_with_residuals, _backward)
