"""The library kernels in JAX's interpreter against the reference; and which one is lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.ops.attention import attention
from fireopd_jax.ops.attention.dispatch import SHORTEST

LENGTH = 150
SEGMENTS = np.zeros((2, LENGTH), np.int32)
SEGMENTS[0, :70], SEGMENTS[0, 70:71], SEGMENTS[0, 71:140], SEGMENTS[1, 20:100] = 1, 2, 3, 4


def operands(dtype, width=64):
    rng = np.random.default_rng(0)
    q, c = rng.normal(size=(2, 2, LENGTH, 4, width))
    k, v = rng.normal(size=(2, 2, 2, LENGTH, width))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, c))


def outcome(arrays, **options):
    q, k, v, c = arrays
    run = functools.partial(attention, segments=SEGMENTS, **options)

    @jax.jit
    def values(q, k, v, c):
        out, pull = jax.vjp(lambda *each: run(*each), q, k, v)
        return out, *pull(c)

    return [np.asarray(each, np.float64) for each in values(q, k, v, c)]


@pytest.mark.parametrize(
    ("name", "dtype", "window", "bound"),
    [
        ("splash", "float32", None, 1e-5),
        ("splash", "float32", 9, 1e-5),
        ("splash", "bfloat16", None, 2**-6),
        ("triton", "bfloat16", None, 2**-6),
    ],
)
def test_kernels_equal_the_reference(name, dtype, window, bound):
    arrays = operands(dtype)
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    wanted = outcome(exact, implementation="reference", window=window)
    found = outcome(arrays, implementation=name, window=window, interpret=True)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() <= bound * np.abs(other).max()


def test_poison_and_padding_do_not_pass_through_a_kernel():
    arrays = operands("float32")
    clean = outcome(arrays, implementation="splash", interpret=True)
    q, k, v, c = arrays
    bad = (q, k.at[:, :, 75].set(jnp.nan), v.at[:, :, 145].set(jnp.inf), c.at[:, 149].set(jnp.nan))
    found = outcome(bad, implementation="splash", interpret=True)
    assert np.isnan(found[0][0, 75:140]).all() and not np.isnan(found[0][0, :75]).any()
    for one, other, axis in zip(found, clean, (1, 1, 2, 2), strict=True):
        one, other = (np.moveaxis(x, axis, 1) for x in (one, other))
        np.testing.assert_array_equal(one[0, :71], other[0, :71])
        assert not one[0, 140:].any()


def lowered(platform, length=512, **options):
    shape = jax.ShapeDtypeStruct
    keys = shape((1, 2, length, 64), jnp.float32)

    def loss(q, k, v, segments):
        return attention(q, k, v, segments, **options).sum()

    arrays = (shape((1, length, 4, 64), jnp.float32), keys, keys, shape((1, length), jnp.int32))
    function = jax.jit(jax.grad(loss, (0, 1, 2)))
    return function.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "options", "kernel"),
    [
        ("tpu", {}, True),
        ("tpu", {"window": 100}, True),
        ("tpu", {"window": jnp.int32(100)}, False),
        ("tpu", {"length": SHORTEST}, False),
        ("cpu", {}, False),
    ],
)
def test_a_tpu_gets_its_kernel_forward_and_backward(platform, options, kernel, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    text = lowered(platform, **options)
    assert text.count("tpu_custom_call") == (3 if kernel else 0)


def test_rows_of_several_devices_have_no_kernel():
    assert "tpu_custom_call" not in lowered("tpu")
