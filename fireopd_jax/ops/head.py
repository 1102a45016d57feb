"""Per-token statistics of softmax(scale * hidden @ head.T), without its logits.

    hidden [*N, D], head [V, D], ids [*N] -> logprob, entropy, logsumexp [*N]

One contract, several implementations: `None` picks, a name is obeyed or refused. This module knows
nothing of rows, masks or prompts; it only flattens the leading axes.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from fireopd_jax.ops import chunked, reference
from fireopd_jax.types import Array, pytree

CHUNK = 8192
IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array, Array]]] = {
    "reference": reference.head_stats,
    "chunked": chunked.head_stats,
}


@pytree
class HeadStats:
    """What a model says of one token id per position, in nats."""

    logprob: Float32[Array, "*N"]
    entropy: Float32[Array, "*N"]
    """Over the whole vocabulary."""
    logsumexp: Float32[Array, "*N"]
    """Of the scaled logits."""


def head_stats(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "*N"],
    *,
    logit_scale: float | Float32[Array, ""] = 1.0,
    implementation: str | None = None,
    chunk: int | None = None,
) -> HeadStats:
    """Return log p(ids), H(p) and log-sum-exp, p = softmax(logit_scale * hidden @ head.T).

    Differentiable to `hidden` and `head` through all three. The scale (one over the temperature) is
    traced, so a new value compiles nothing; its own gradient is zero by definition. Everything is
    float32, the gradients' matrix products excepted, which take operands of the inputs' type. An
    id outside the vocabulary has log-probability -inf.

    `chunk` columns of logits exist at a time (8192 by default). `None` picks "chunked"; where the
    vocabulary is no larger than the chunk it is one chunk, so "reference" would gain nothing there
    either, and serves the tests.
    """
    name = implementation or "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown head implementation {name!r}; known: {', '.join(sorted(IMPLEMENTATIONS))}"
        )
    chunk = CHUNK if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    shape = ids.shape
    scale = jnp.asarray(logit_scale, jnp.float32)
    stats = IMPLEMENTATIONS[name](
        jnp.reshape(hidden, (ids.size, hidden.shape[-1])),
        jnp.asarray(head),
        jnp.reshape(ids, (ids.size,)),
        scale,
        chunk,
    )
    return HeadStats(*(jnp.reshape(value, shape) for value in stats))
