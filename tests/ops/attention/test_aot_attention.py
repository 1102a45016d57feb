"""Attention compiles to machine code for real TPUs and an H200, at the sizes of real models."""

import re

import jax
import jax.numpy as jnp
import pytest

from fireopd_jax.ops.attention import attention
from tests import aot_gpu, aot_tpu

pytestmark = pytest.mark.aot
no_gpu = aot_gpu.missing()


def shapes(length, heads=16, shared=8, width=128, rows=1, dtype=jnp.bfloat16):
    array = jax.ShapeDtypeStruct
    keys = array((rows, shared, length, width), dtype)
    segments = array((rows, length), jnp.int32)
    return array((rows, length, heads, width), dtype), keys, keys, segments


def gradient(**options):
    def loss(q, k, v, segments):
        return attention(q, k, v, segments, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


def check(compiled, length):
    assert not re.search(rf"\[(\d+,)*{length},{length}\]", compiled.as_text())


@pytest.mark.skipif(not aot_tpu.INSTALLED, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize(
    ("generation", "options", "sizes"),
    [
        ("v5e", {}, {}),
        ("v5p", {"window": 1024}, {}),
        ("v6e", {}, {"width": 64, "dtype": jnp.float32, "rows": 2}),
    ],
    ids=str,
)
def test_splash_compiles(generation, options, sizes):
    function, length = gradient(implementation="splash", **options), 8192
    compiled = aot_tpu.compile_for(generation, function, *shapes(length, **sizes))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    check(compiled, length)


@pytest.mark.skipif(not aot_tpu.INSTALLED, reason="needs libtpu: pip install libtpu")
def test_chunks_compile_for_a_tpu():
    function = gradient(implementation="chunked", window=jnp.int32(1024))
    check(aot_tpu.compile_for("v5e", function, *shapes(8192)), 8192)


@pytest.mark.skipif(no_gpu is not None, reason=no_gpu or "")
@pytest.mark.parametrize("name", ["chunked", "triton"])
def test_an_h200_can_run_it(name):
    compiled = aot_gpu.compile_for_h200(gradient(implementation=name), *shapes(8192))
    check(compiled, 8192)
