"""Head statistics in plain jnp over the full logits: the truth for tests, gradients by autodiff."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from fireopd_jax.types import Array

Stats = Float32[Array, " N"]


def head_stats(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, " N"],
    scale: Float32[Array, ""],
    chunk: int,
) -> tuple[Stats, Stats, Stats]:
    """Return log-probability, entropy and log-sum-exp; `chunk` has no meaning here."""
    del chunk
    vocabulary = head.shape[0]
    logits = jnp.matmul(
        hidden.astype(jnp.float32),
        head.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    ) * jax.lax.stop_gradient(scale)
    logsumexp = jax.nn.logsumexp(logits, axis=1)
    logp = jax.nn.log_softmax(logits, axis=1)
    # A logit of -inf has p = 0, and 0 * -inf is NaN.
    entropy = -jnp.sum(jnp.exp(logp) * jnp.where(logp > -jnp.inf, logp, 0.0), axis=1)
    inside = (ids >= 0) & (ids < vocabulary)
    at = jnp.clip(ids, 0, vocabulary - 1)[:, None]
    picked = jnp.take_along_axis(logits, at, axis=1)[:, 0]
    # Subtract in this order and the log-probability keeps the precision of log_softmax.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=1))
    logprob = jnp.where(inside, picked - top, -jnp.inf) - (logsumexp - top)
    return logprob, entropy, logsumexp
