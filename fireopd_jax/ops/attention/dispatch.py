"""The attention implementations by name, and the choice of the default one.

    at most SHORTEST tokens -> reference
    TPU                     -> splash, if it supports the shape and the window
    else                    -> chunked

The platform is that which a program is lowered for, as for the head (`ops.dispatch`). `triton` is
used where it is named only: it was compiled for Hopper, and run in JAX's interpreter. Forward and
backward pass are chosen alike, since their residuals are the same: q, k, v, output, log-sum-exp.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from fireopd_jax.ops.attention import chunked, splash, triton
from fireopd_jax.ops.attention.masks import Layout
from fireopd_jax.ops.attention.reference import reference
from fireopd_jax.ops.attention.settings import AttentionSettings
from fireopd_jax.types import Array

SHORTEST = 256
"""Longest rows for which all scores at once are the default: there, blocks save no memory worth
their recomputation."""

SAVED = "attention"
"""Name of the results for policies of `jax.checkpoint`: output and log-sum-exp."""
PLAIN = "reference"
"""All scores at once, differentiated by JAX."""
KERNELS: dict[str, Any] = {"splash": splash, "triton": triton}
"""Modules with `forward`, `backward` and an `unsupported_reason`."""
PLATFORMS = {"splash": "tpu", "triton": "gpu"}
"""Platform that a kernel needs outside its interpreter; other implementations run anywhere."""
IMPLEMENTATIONS = (PLAIN, "chunked", *KERNELS)


def run(
    settings: AttentionSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
) -> Float[Array, "B T N H"]:
    """Return the output of the named or the default implementation.

    Operands must be finite, and zero at padding; see `guard`.
    """
    name = settings.implementation
    if name == PLAIN or (name is None and q.shape[1] <= SHORTEST):
        return checkpoint_name(reference(settings, q, k, v, layout), SAVED)
    return linear(settings, q, k, v, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(settings: AttentionSettings, q: Array, k: Array, v: Array, layout: Layout) -> Array:
    """Return the output of an implementation that keeps no scores for its gradient."""
    return choose(settings, "forward", q, k, v, layout)[0]


def _forward(settings: AttentionSettings, q: Array, k: Array, v: Array, layout: Layout):
    out, logsumexp = checkpoint_name(choose(settings, "forward", q, k, v, layout), SAVED)
    return out, (q, k, v, layout, out, logsumexp)


def _backward(settings: AttentionSettings, kept: tuple, d_out: Array):
    return *choose(settings, "backward", *kept, d_out), None


linear.defvjp(_forward, _backward)


def choose(settings: AttentionSettings, pass_name: str, q: Array, *rest: Any) -> Any:
    """Return the result of the forward or backward pass of the implementation."""

    def bind(module: Any) -> Callable[..., Any]:
        return functools.partial(getattr(module, pass_name), settings)

    if settings.implementation is not None:
        module = KERNELS.get(settings.implementation, chunked)
        return bind(module)(q, *rest)
    kernels = default_kernels(settings, q, rest[0], rest[2])
    if not kernels:
        return bind(chunked)(q, *rest)
    branches = {platform: bind(kernel) for platform, kernel in kernels.items()}
    return lax.platform_dependent(q, *rest, **branches, default=bind(chunked))


def default_kernels(
    settings: AttentionSettings, q: Array, k: Array, layout: Layout
) -> dict[str, Any]:
    """Return the kernel module of each platform that has one worth using for the operands."""
    reason = splash.unsupported_reason(*shape_of(settings, q, k, layout))
    # The compiler cannot partition a kernel: each of several devices needs its own rows.
    alone = settings.local or jax.device_count() == 1
    return {} if reason or not alone else {"tpu": splash}


def shape_of(settings: AttentionSettings, q: Array, k: Array, layout: Layout) -> tuple:
    """Return the arguments of `unsupported_reason`: T, N, K, H, dtype, window.

    The window is None without one, an int if static and counting indices, else a description.
    """
    window: int | str | None = settings.window
    if layout.window is not None:
        window = "a traced window" if settings.window is None else "a window that counts positions"
        if settings.window is not None and settings.by_index:
            window = settings.window
    return q.shape[1], q.shape[2], k.shape[1], q.shape[3], q.dtype.name, window
