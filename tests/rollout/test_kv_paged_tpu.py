"""The paged cache for the TPU kernel: equal to the plain paged cache, and it compiles."""

import jax
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from fireopd_jax.config import UserError
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from tests import aot_tpu
from tests.cases import qwen_loop, random_params, through_cache, tiny_model

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


def test_other_widths_of_heads_are_refused():
    with pytest.raises(
        UserError, match=r"paged_tpu needs a head width that is a multiple of 128.* has 8"
    ):
        PagedTPU().init(tiny_model().config, 2, 1, 32)


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
