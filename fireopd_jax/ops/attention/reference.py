"""Attention with all scores at once, differentiated by JAX: the quadratic reference."""

from jaxtyping import Float

from fireopd_jax.ops.attention.masks import Layout, allowed, tokens_of
from fireopd_jax.ops.attention.settings import AttentionSettings
from fireopd_jax.ops.attention.slots import attend
from fireopd_jax.types import Array


def reference(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
) -> Float[Array, "B T N H"]:
    """Return attention by `attend` with a mask [B, T, T]; scores are float32 [B, N, T, T]."""
    tokens = tokens_of(layout, q.shape[1])
    return attend(q, k, v, allowed(tokens, tokens, layout.window), settings.scale)
