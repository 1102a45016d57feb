"""Keep what is not finite in its own segment, and padding out of everything.

A masked key has weight 0, but 0 * NaN is NaN: one bad token would reach every token of its block,
forward and backward. So the implementations get zeros in place of padding and of tokens that are
not finite, and what a bad token would have reached is set to NaN afterwards:

    forward    query i, if q_i or any k_j, v_j that it attends to is not finite
    backward   d q_i, if its output or cotangent is not finite; d k_j, d v_j, if that of any
               query i that attends to j is not

Tokens of a segment are contiguous but for padding, so the nearest bad token before (or after) is
enough to know, and no array is larger than the operands.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fireopd_jax.ops.attention.masks import Layout
from fireopd_jax.types import Array

Run = Callable[..., Any]
"""(settings, q, k, v, layout) -> output [B, T, N, H]; differentiable in q, k, v."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def guarded(
    run: Run,
    settings: Any,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    layout: Layout,
) -> Float[Array, "B T N H"]:
    """Return `run`'s attention, 0 at padding and NaN exactly where a token is not finite."""
    operands, bad = _clean(q, k, v, layout)
    out = run(settings, *operands, layout)
    return _mark(out, layout.segments > 0, bad)


def _forward(run: Run, settings: Any, q: Array, k: Array, v: Array, layout: Layout):
    operands, bad = _clean(q, k, v, layout)
    out, pull = jax.vjp(lambda *each: run(settings, *each, layout), *operands)
    return _mark(out, layout.segments > 0, bad), (pull, layout, bad)


def _backward(run: Run, settings: Any, kept: tuple, d_out: Array):
    pull, layout, bad = kept
    real = layout.segments > 0
    bad_out = (bad | ~_finite(d_out)) & real
    d_q, d_k, d_v = pull(jnp.where((real & ~bad_out)[:, :, None, None], d_out, 0))
    reached = _nearest_reaches(bad_out, layout, backward=True)
    d_q = _mark(d_q, real, bad_out)
    d_k, d_v = (_mark(each, real[:, None], reached[:, None]) for each in (d_k, d_v))
    return d_q, d_k, d_v, None


guarded.defvjp(_forward, _backward)


def _clean(q: Array, k: Array, v: Array, layout: Layout) -> tuple[tuple, Bool[Array, "B T"]]:
    """Return q, k, v with zeros at padding and bad tokens, and which outputs will be NaN."""
    real = layout.segments > 0
    bad_query = ~_finite(q) & real
    bad_key = ~(_finite(k.swapaxes(1, 2)) & _finite(v.swapaxes(1, 2))) & real
    q = jnp.where((real & ~bad_query)[:, :, None, None], q, 0)
    used = (real & ~bad_key)[:, None, :, None]
    k, v = jnp.where(used, k, 0), jnp.where(used, v, 0)
    return (q, k, v), bad_query | _nearest_reaches(bad_key, layout)


def _finite(x: Array) -> Bool[Array, "B T"]:
    """Return which tokens of x [B, T, heads, H] are finite in every number."""
    return jnp.isfinite(x).all(axis=(2, 3))


def _mark(x: Array, real: Array, bad: Array) -> Array:
    """Return x with 0 where not `real`, NaN where `bad`; both lack the last axes of x."""
    axes = tuple(range(real.ndim, x.ndim))
    real, bad = jnp.expand_dims(real, axes), jnp.expand_dims(bad, axes)
    return jnp.where(real, jnp.where(bad, jnp.asarray(jnp.nan, x.dtype), x), 0)


def _nearest_reaches(
    bad: Bool[Array, "B T"], layout: Layout, backward: bool = False
) -> Bool[Array, "B T"]:
    """Return which tokens attend to a bad one, or with `backward` are attended to by one."""
    length = bad.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], bad.shape)
    if backward:
        nearest = jax.lax.cummin(jnp.where(bad, index, length), axis=1, reverse=True)
    else:
        nearest = jax.lax.cummax(jnp.where(bad, index, -1), axis=1)
    found = (nearest >= 0) & (nearest < length)
    nearest = jnp.clip(nearest, 0, max(length - 1, 0))

    def at_nearest(x: Array) -> Array:
        return jnp.take_along_axis(x, nearest, axis=1)

    found &= (at_nearest(layout.segments) == layout.segments) & (layout.segments > 0)
    if layout.window is not None and layout.positions is not None:
        distance = jnp.abs(at_nearest(layout.positions) - layout.positions)
        found &= distance < layout.window
    return found
