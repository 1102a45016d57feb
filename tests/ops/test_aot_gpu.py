"""The GPU kernels compile for an H200 at the size of a real model, with no GPU at hand."""

import re

import jax
import jax.numpy as jnp
import pytest

from fireopd_jax.ops import pallas_gpu, pallas_gpu_rows
from fireopd_jax.ops.logits import HeadSettings
from tests import aot_gpu

reason = aot_gpu.missing()
pytestmark = [pytest.mark.aot, pytest.mark.skipif(reason is not None, reason=reason or "")]

TOKENS, WIDTH, VOCABULARY = 16384, 4096, 151936
KERNELS = {"pallas_gpu": pallas_gpu.forward, "pallas_gpu_rows": pallas_gpu_rows.forward}
EACH = pytest.mark.parametrize("name", KERNELS)
KERNEL = r'custom_call_target="mosaic_gpu\w*"'


def compiled(name, dump, k, tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY, **options):
    """Compile with ids, two support ids, a scale, and what `options` ask for."""
    dtype = options.pop("dtype", jnp.bfloat16)
    limited, computes_weight = options.pop("limited", False), options.pop("computes_weight", False)
    settings = HeadSettings(vocabulary=vocabulary, chunk=8192, k=k, **options)

    def run(hidden, head, ids, support_ids, scale, limit, factor):
        weight_inputs = (factor, scale) if computes_weight else None
        limit = limit if limited else None
        return KERNELS[name](hidden, head, ids, support_ids, scale, limit, settings, weight_inputs)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    shapes = [
        array(tokens, width, dtype=dtype),
        array(vocabulary, width, dtype=dtype),
        array(tokens, dtype=jnp.int32),
        array(tokens, 2, dtype=jnp.int32),
        array(),
        array(dtype=jnp.int32),
        array(tokens),
    ]
    return aot_gpu.compile_for_h200(run, *shapes, dump=dump)


def noted(dump):
    found = aot_gpu.resources(dump)
    if not found:
        pytest.skip("this JAX does not note registers and spills")
    return found


@EACH
@pytest.mark.parametrize("k", [16, 64])
def test_top_k_compiles_at_a_real_size(name, k, tmp_path, record_property):
    text = compiled(name, tmp_path, k).as_text()
    assert re.search(KERNEL, text)
    assert not re.search(rf"\[({TOKENS},{VOCABULARY}|{VOCABULARY},{TOKENS})\]", text)
    for kernel in noted(tmp_path):
        record_property(f"{name} k={k}", kernel)
        # In the insertion, which is rare. More would mean that the logits themselves are moved.
        assert kernel["stores"] < 512


@EACH
def test_statistics_alone_spill_no_register(name, tmp_path):
    compiled(name, tmp_path, k=0)
    for kernel in noted(tmp_path):
        assert (kernel["stores"], kernel["loads"]) == (0, 0)


@EACH
def test_no_reduction_crosses_warps(name, tmp_path):
    # Warpgroups of a block would share the memory that it crosses by, and race.
    compiled(name, tmp_path, k=16, tokens=256, width=512, vocabulary=2000)
    texts = [path.read_text() for path in tmp_path.glob("*.after_layout_inference.txt")]
    if not texts:
        pytest.skip("this JAX does not note layouts")
    lines = [line for text in texts for line in text.splitlines() if "vector.reduction" in line]
    assert lines
    for line in lines:
        assert re.search(r"warp_dims = \[#mosaic_gpu\.Replicated<times = 4>\]", line)


@EACH
@pytest.mark.parametrize(
    "options",
    [
        {"limited": True, "softcap": 30.0},
        {"computes_weight": True, "dtype": jnp.float16, "tokens": 384},
        {"k": 128, "tokens": 1, "vocabulary": 1003},
        {"width": 64, "tokens": 0, "vocabulary": 37},
    ],
)
def test_options_and_odd_sizes_compile(name, options, tmp_path):
    sizes = {"k": 5, "tokens": 300, "width": 512, "vocabulary": 5000}
    sizes |= options
    text = compiled(name, None, **sizes).as_text()
    # Nothing is launched for no token.
    assert bool(re.search(KERNEL, text)) == (sizes["tokens"] > 0)


def test_float32_compiles_by_rows():
    program = compiled("pallas_gpu_rows", None, 16, 256, 512, 5000, dtype=jnp.float32)
    assert re.search(KERNEL, program.as_text())
