"""Head statistics in plain jnp from the full logits, as the oracle of the tests."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops.logits import HeadSettings, as_vd, exists, logits
from fireopd_jax.ops.partials import weight
from fireopd_jax.types import Array

Stats = Float32[Array, " N"]


def statistics(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    support_ids: Int32[Array, "N K"],
    scale: Float32[Array, ""],
    settings: HeadSettings,
) -> tuple[Stats, Stats, Stats, Float32[Array, "N K"]]:
    """Return log-probability, entropy, log-sum-exp and the log-probabilities at `support_ids`.

    Differentiable in `hidden` and `head`, not in `scale`.
    """
    z = all_logits(hidden, head, scale, settings)
    logprob, entropy, logsumexp, top = _of_logits(z, ids)
    at = jnp.clip(support_ids, 0, settings.vocabulary - 1)
    support = jnp.take_along_axis(z, at, axis=1) - top[:, None] - (logsumexp - top)[:, None]
    known = exists(support_ids, settings.vocabulary)
    return logprob, entropy, logsumexp, jnp.where(known, support, -jnp.inf)


def top_k(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"] | Float[Array, "D V"],
    ids: Int32[Array, " N"],
    scale: Float32[Array, ""],
    settings: HeadSettings,
    weight_inputs: tuple[Array, Array] | None = None,
) -> tuple[Stats, Stats, Stats, Int32[Array, "N K"], Float32[Array, "N K"], Stats | None]:
    """Return log-probability, entropy, log-sum-exp, top-K ids, their log-probabilities, weight."""
    z = all_logits(hidden, head, scale, settings)
    logprob, entropy, logsumexp, top = _of_logits(z, ids)
    values, found = lax.top_k(z, min(settings.k, settings.vocabulary))
    lacking = ((0, 0), (0, settings.k - found.shape[1]))
    values = jnp.pad(values, lacking, constant_values=-jnp.inf)
    found = jnp.pad(found, lacking, constant_values=-1)
    return (
        logprob,
        entropy,
        logsumexp,
        jnp.where(values == -jnp.inf, -1, found),
        values - top[:, None] - (logsumexp - top)[:, None],
        weight_inputs and weight(entropy, weight_inputs, settings.vocabulary),
    )


def all_logits(hidden: Array, head: Array, scale: Array, settings: HeadSettings) -> Array:
    """Return the logits of all token ids, float32 [N, V]."""
    rows = as_vd(head, settings)[: settings.vocabulary]
    return logits(hidden, rows, lax.stop_gradient(scale), settings.softcap)[0]


def _of_logits(z: Array, ids: Array) -> tuple[Array, Array, Array, Array]:
    """Return log-probability, entropy, log-sum-exp and maximum of each row."""
    vocabulary = z.shape[1]
    logsumexp = jax.nn.logsumexp(z, axis=1)
    logp = jax.nn.log_softmax(z, axis=1)
    # A logit of -inf has p = 0, and 0 * -inf is NaN.
    entropy = -jnp.sum(jnp.exp(logp) * jnp.where(logp > -jnp.inf, logp, 0.0), axis=1)
    at = jnp.clip(ids, 0, vocabulary - 1)[:, None]
    picked = jnp.take_along_axis(z, at, axis=1)[:, 0]
    # In this order the subtraction is as precise as log_softmax.
    top = lax.stop_gradient(jnp.max(z, axis=1))
    logprob = jnp.where(exists(ids, vocabulary), picked - top, -jnp.inf) - (logsumexp - top)
    return logprob, entropy, logsumexp, top
