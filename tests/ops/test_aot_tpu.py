"""The TPU kernels compile to machine code for real TPUs, at real shapes; and what they cost."""

import re

import jax.numpy as jnp
import pytest

from fireopd_jax.ops.blocks import Blocks
from tests import aot_tpu, static_tpu

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(not aot_tpu.INSTALLED, reason="needs libtpu: pip install libtpu"),
]
REAL = {"tokens": 16384, "width": 4096, "vocabulary": 151936}
"""Qwen3-8B's head."""

KERNEL = 'custom_call_target="tpu_custom_call"'

EACH = pytest.mark.parametrize("generation", sorted(aot_tpu.TOPOLOGIES))


def check(compiled, tokens, width, vocabulary, kernels=1):
    text = compiled.as_text()
    assert text.count(KERNEL) == kernels
    assert not re.search(rf"\[({tokens},{vocabulary}|{vocabulary},{tokens})\]", text)
    # Nothing large but the rows of the head at the sampled ids.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * tokens * width * 4


@EACH
@pytest.mark.parametrize(
    "options", [{"k": 16}, {"k": 64}, {"k": 16, "weigh": True}, {"k": 0}, {"support": 64}], ids=str
)
def test_compiles_at_the_real_shape(generation, options):
    check(aot_tpu.compile_head(generation, **REAL, **options), **REAL)


@EACH
@pytest.mark.parametrize("options", [{"k": 16}, {"support": 16}], ids=str)
def test_compiles_in_float32(generation, options):
    shape = {"tokens": 1024, "width": 4096, "vocabulary": 32000}
    compiled = aot_tpu.compile_head(generation, **shape, dtype=jnp.float32, **options)
    check(compiled, **shape)


@pytest.mark.parametrize(
    "shape",
    [(300, 896, 151936), (1100, 2880, 20001), (3, 48, 50), (1, 8192, 1003), (2048, 5120, 32000)],
    ids=str,
)
@pytest.mark.parametrize("options", [{"k": 5, "softcap": 30.0}, {"support": 3}], ids=str)
def test_compiles_at_odd_shapes(shape, options):
    compiled = aot_tpu.compile_head("v5e", *shape, **options)
    assert compiled.as_text().count(KERNEL) == 1


@pytest.mark.parametrize(("generation", "most"), [("v5e", 0.15), ("v6e", 0.25)])
def test_statistics_and_list_cost_little_beside_the_product(generation, most):
    """By bundles for 512 x 512 logits of width 4096 and K = 16, and cycles of the product.

    How often a tile needs what is from a simulation of 512 tokens and V = 151936: share of tiles
    that take anything, trips through the bins, trips through tiles that are taken again.
    """
    found = static_tpu.regions(
        generation, "fireopd_head_statistics", **REAL, k=16, blocks=Blocks(512, 512, 1024)
    )
    if found is None:
        pytest.skip("this libtpu dumps no bundles")
    loops = static_tpu.inner_loops(found)
    (product, _), (trip, (_, once, before)), (trip_again, between) = loops
    cycles = 2 * 512 * 512 * 4096 / static_tpu.MXU_FLOPS[generation]
    assert 4 * product < cycles
    for order, (share, trips, trips_again) in {
        "frequent ids first, as tokenizers have them": (0.17, 0.27, 0.07),
        "any order": (1.0, 2.42, 0.63),
    }.items():
        cost = once + share * (before + sum(between)) + trips * trip + trips_again * trip_again
        print(f"{generation}, {order}: {cost:.0f} bundles, {cost / cycles:.1%} of the product")
        assert once < cost < most * cycles
