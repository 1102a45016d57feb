"""The paged cache for the TPU kernel: equal to the plain paged cache, and it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import Shape
from tests import aot_tpu
from tests.cases import (
    make_prompts,
    plain_kernel,
    qwen_loop,
    random_params,
    through_cache,
    tiny_model,
)

SLIDING = {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 5}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SLIDING], ids=["full", "sliding"])
def test_the_kernel_sees_what_plain_pages_hold(options, monkeypatch):
    model = tiny_model(num_hidden_layers=2, head_dim=128, num_attention_heads=4, **options)
    params = random_params(model)
    rng = np.random.default_rng(0)
    prompt = np.array([9, 1, 16], np.int32)
    rows = [rng.integers(0, 32, length + 4).astype(np.int32) for length in prompt]
    wanted = through_cache(model, params, rows, prompt, Paged(page_size=8))
    calls = []

    def reference(*arguments, num_kv_pages_per_block, num_queries_per_block, **options):
        calls.append(options["sliding_window"])
        return kernel.ref_ragged_paged_attention(*arguments, **options)

    # Pallas' interpreter does not support this kernel. The library has a reference in plain JAX,
    # which needs the number of rows as a Python integer, not a tracer.
    monkeypatch.setattr(kernel, "ragged_paged_attention", reference)
    with jax.disable_jit():
        got = through_cache(model, params, rows, prompt, PagedTPU(page_size=8))
    assert len(calls) == 8 and set(calls) == {None, options.get("sliding_window")}
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("width", [8, 128])
def test_heads_of_any_width_fill_whole_lanes(width, options, monkeypatch):
    model = tiny_model(num_hidden_layers=2, head_dim=width, num_attention_heads=4, **options)
    params, rng = random_params(model), np.random.default_rng(0)
    prompt = np.array([9, 1, 16], np.int32)
    rows = [rng.integers(0, 32, length + 4).astype(np.int32) for length in prompt]
    wanted = through_cache(model, params, rows, prompt, Dense())
    monkeypatch.setattr(kernel, "ragged_paged_attention", plain_kernel)
    got = through_cache(model, params, rows, prompt, PagedTPU(page_size=8))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    pool = PagedTPU().init(model.config, Shape(2, 1, 8, 32, 32)).pool
    assert {leaf.shape[3] for leaf in pool} == {128}


@pytest.mark.aot
@pytest.mark.skipif(not aot_tpu.INSTALLED, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize(
    ("memory", "dtype"),
    [
        (Paged(page_size=16), "bfloat16"),
        (PagedTPU(page_size=16), "bfloat16"),
        (PagedTPU(page_size=16), "float32"),
    ],
    ids=str,
)
def test_the_whole_loop_compiles_for_a_tpu(memory, dtype):
    function, flat = qwen_loop(memory, dtype)
    compiled = aot_tpu.compile_for("v5e", function, *flat)
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert (kernels > 0) == isinstance(memory, PagedTPU)


def sizes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.aot
@pytest.mark.skipif(not aot_tpu.INSTALLED, reason="needs libtpu: pip install libtpu")
def test_a_rollout_on_a_tpu_takes_its_cache_once_and_its_layers_once_more():
    """The compiler's plan: no second cache in another order, no scores over its whole length."""
    rows, width, room = 8, 1024, 8192
    model = tiny_model(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, intermediate_size=512, dtype="bfloat16",
    )  # fmt: skip
    prompts = make_prompts([width] * rows, width)
    flat, tree = jax.tree.flatten((model.shapes(), prompts, Sampling.of((1,), room, 0)))

    def run(*leaves):
        params, prompts, sampling = jax.tree.unflatten(tree, leaves)
        return generate(
            model, params, prompts, sampling, jnp.int32(0), max_tokens=room, memory=memory
        )

    memory = PagedTPU()
    shape = Shape.of(rows, width, room, align=memory.align)
    cache = sizes_of(jax.eval_shape(lambda: memory.init(model.config, shape)))
    layers = sizes_of(model.shapes()["layers"])
    found = aot_tpu.compile_for("v5e", run, *flat).memory_analysis()
    assert found.temp_size_in_bytes < 1.05 * (cache + layers) + 2**26
