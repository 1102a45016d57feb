"""Head statistics by a scan over vocabulary chunks, on any platform.

    forward   each chunk of logits [N, C] folds into (max, sum, tilted sum, picked logit) per token
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

from fireopd_jax.types import Array

LOWEST = -1e30
"""Start of the running maximum: finite, because the update multiplies m - max by s = 0."""

Stats = Float32[Array, " N"]


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    """Multiply over one axis of each, accumulating in float32."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    # Who passes float32 asks for float32, not for the TF32 or bfloat16 passes of some accelerators.
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _rows(head: Array, first: Array | int, width: int) -> Array:
    return lax.dynamic_slice_in_dim(head, first, width, axis=0)


def _is_id(ids: Array, first: Array | int, width: int) -> Bool[Array, "N C"]:
    """Mark each token's id among the columns [first, first + width).

    A compare fuses into the pass over the chunk; a gather or scatter would be one more.
    """
    return (ids - first)[:, None] == jnp.arange(width, dtype=jnp.int32)[None, :]


def _over_vocabulary(step: Callable[..., Any], carry: Any, vocabulary: int, chunk: int) -> Any:
    """Apply `step(carry, first, width)` to all columns, in order."""
    width = min(chunk, vocabulary)
    full, rest = divmod(vocabulary, width)

    def body(carry, index):
        return step(carry, index * width, width), None

    carry, _ = lax.scan(body, carry, jnp.arange(full, dtype=jnp.int32))
    return step(carry, full * width, rest) if rest else carry


def _forward(hidden: Array, head: Array, ids: Array, scale: Array, chunk: int):
    """Return each token's max m, log s, entropy and the logit of its id."""

    def step(carry, first, width):
        m, s, t, picked = carry
        z = _dot(hidden, _rows(head, first, width), (1, 1)) * scale
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
        return top, s, t, jnp.where(found, value, picked)

    zero = jnp.zeros(ids.shape, jnp.float32)
    start = (zero + LOWEST, zero, zero, zero - jnp.inf)
    m, s, t, picked = _over_vocabulary(step, start, head.shape[0], chunk)
    log_s = jnp.log(s)
    return m, log_s, log_s - t / s, picked


def head_stats(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, " N"],
    scale: Float32[Array, ""],
    chunk: int,
) -> tuple[Stats, Stats, Stats]:
    """Return log-probability, entropy and log-sum-exp; no gradient to `scale`."""
    return _differentiable(hidden, head, ids, scale, chunk)


def _statistics(hidden: Array, head: Array, ids: Array, scale: Array, chunk: int):
    return _with_residuals(hidden, head, ids, scale, chunk)[0]


def _with_residuals(hidden: Array, head: Array, ids: Array, scale: Array, chunk: int):
    m, log_s, entropy, picked = _forward(hidden, head, ids, scale, chunk)
    # picked <= m and log s >= 0 hold exactly, hence logprob <= 0.
    stats = ((picked - m) - log_s, entropy, m + log_s)
    return stats, (hidden, head, ids, scale, m, log_s, entropy)


def _backward(chunk, residuals, cotangents):
    """Accumulate the gradients, with d/dz = p (c0 + c1 log p) + one-hot(id) to_logprob.

    From dH/dz = -p (log p + H): c1 = -to_entropy, c0 = to_lse - to_logprob - to_entropy H.
    """
    hidden, head, ids, scale, m, log_s, entropy = residuals
    to_logprob, to_entropy, to_logsumexp = cotangents
    # A token nobody asks about must not turn the whole of d head into NaN by its 0 * NaN.
    asked = (to_logprob != 0) | (to_entropy != 0) | (to_logsumexp != 0)
    state = jnp.where(asked[:, None], hidden, 0)
    c1 = -to_entropy
    # A zero cotangent of a non-finite entropy is zero, too.
    c0 = to_logsumexp - to_logprob - jnp.where(to_entropy != 0, to_entropy * entropy, 0.0)
    dtype = jnp.promote_types(hidden.dtype, head.dtype)

    def step(carry, first, width):
        d_hidden, d_head = carry
        rows = _rows(head, first, width)
        logp = (_dot(hidden, rows, (1, 1)) * scale - m[:, None]) - log_s[:, None]
        finite = jnp.where(logp > -jnp.inf, logp, 0.0)
        d_z = jnp.exp(logp) * (c0[:, None] + c1[:, None] * finite)
        d_z = d_z + jnp.where(_is_id(ids, first, width), to_logprob[:, None], 0.0)
        d_z = jnp.where(asked[:, None], d_z * scale, 0.0).astype(dtype)
        d_hidden = d_hidden + _dot(d_z, rows, (1, 0))
        d_rows = _dot(d_z, state, (0, 0)).astype(head.dtype)
        # Each row of d head is complete in one product: written in place, rounded once.
        return d_hidden, lax.dynamic_update_slice_in_dim(d_head, d_rows, first, axis=0)

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, head.dtype))
    d_hidden, d_head = _over_vocabulary(step, start, head.shape[0], chunk)
    return d_hidden.astype(hidden.dtype), d_head, None, None


_differentiable = jax.custom_vjp(_statistics, nondiff_argnums=(4,))
_differentiable.defvjp(_with_residuals, _backward)
