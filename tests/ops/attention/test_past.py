"""Attention of a piece of a prompt to itself and its past: equal to `attend` over all of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.ops.attention import attend, attend_step, attend_to_past, slots, visible_keys


def drawn(length, heads, shared, dtype, rows=2, width=4):
    rng = np.random.default_rng(length)
    q = jnp.asarray(rng.normal(size=(rows, length, heads, width)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, rows, shared, length, width)), dtype)
    return q, k, v


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 64])
@pytest.mark.parametrize("start", [0, 4, 12])
def test_equals_attention_over_the_whole_past(start, window, heads, shared, dtype):
    piece = 4
    q, k, v = drawn(24, heads, shared, dtype)
    own, end = slice(start, start + piece), start + piece
    distance = jnp.arange(start, end)[:, None] - jnp.arange(end)[None]
    mask = jnp.broadcast_to(visible_keys(distance, window)[None], (2, *distance.shape))
    wanted = attend(q[:, own], k[:, :, :end], v[:, :, :end], mask, 0.3)

    # What lies beyond the piece, or before the window, is never asked for.
    reach = 0 if window is None else max(0, start - window + 1) // piece * piece
    there = (jnp.arange(24) >= reach) & (jnp.arange(24) < start)
    kept = [jnp.where(there[:, None], x, jnp.nan) for x in (k, v)]

    def past(j):
        return tuple(jax.lax.dynamic_slice_in_dim(x, j * piece, piece, axis=2) for x in kept)

    @jax.jit
    def got(start):
        return attend_to_past(q[:, own], (k[:, :, own], v[:, :, own]), past, start, window, 0.3)

    result = got(jnp.int32(start))
    assert result.dtype == wanted.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(result, np.float32), np.asarray(wanted, np.float32), atol=tolerance
    )


def test_without_a_past_there_is_no_loop():
    q, k, v = drawn(8, 4, 2, "float32")

    def run(start):
        return attend_to_past(q, (k, v), None, start)

    assert "while" not in str(jax.make_jaxpr(run)(jnp.int32(0)))
    distance = jnp.arange(8)[:, None] - jnp.arange(8)[None]
    mask = jnp.broadcast_to(visible_keys(distance, None)[None], (2, 8, 8))
    np.testing.assert_allclose(run(jnp.int32(0)), attend(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("position", [(0, 0), (3, 9), (22, 4)])
def test_a_step_reads_the_live_columns_alone(position, window, heads, shared, dtype, monkeypatch):
    """Of 23 columns in blocks of 5, of which the last begins in the one before."""
    monkeypatch.setattr(slots, "COLUMNS", 5)
    length = 23
    q, k, v = drawn(24, heads, shared, dtype)
    q, k, v, at = q[:, :1], k[:, :, :length], v[:, :, :length], jnp.array(position)
    distance = at[:, None] - jnp.arange(length)[None]
    wanted = attend(q, k, v, visible_keys(distance, window)[:, None], 0.3)
    kept = [jnp.where(jnp.arange(length)[:, None] <= max(position), x, 1e30) for x in (k, v)]
    starts = []

    def columns(start, size):
        jax.debug.callback(lambda start: starts.append(int(start)), start)
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in kept)

    got = jax.jit(lambda at: attend_step(q, columns, shared, length, at, window, 0.3))(
        jnp.array(position)
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=tolerance
    )
    jax.effects_barrier()
    first = 0 if window is None else max(0, min(position) - window + 1) // 5
    assert sorted(starts) == [min(5 * j, length - 5) for j in range(first, max(position) // 5 + 1)]


def test_a_step_on_an_accelerator_has_no_loop(monkeypatch):
    q, k, v = drawn(600, 4, 2, "float32")

    def columns(start, size):
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (k, v))

    def loops():
        traced = jax.make_jaxpr(functools.partial(attend_step, q[:, :1], columns, 2, 600))
        return str(traced(jnp.array([3, 5]))).count("while[")

    assert loops() == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops() == 0
