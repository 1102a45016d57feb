"""The paged cache for the GPU kernel: equal to the plain paged cache, and it compiles."""

import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU, library
from fireopd_jax.rollout.state import Shape
from tests import aot_gpu
from tests.cases import qwen_loop, random_params, through_cache, tiny_model


def test_the_kernel_sees_what_plain_pages_hold(monkeypatch):
    model = tiny_model(num_hidden_layers=2, head_dim=16, num_attention_heads=4)
    params = random_params(model)
    rng = np.random.default_rng(0)
    prompt = np.array([9, 1, 16], np.int32)
    rows = [rng.integers(0, 32, length + 4).astype(np.int32) for length in prompt]
    wanted = through_cache(model, params, rows, prompt, Paged(page_size=16), piece=16)
    kernel, calls = library().paged_attention, []

    def interpreted(*arguments, **options):
        calls.append(options)
        return kernel(*arguments, **options, interpret=True)

    monkeypatch.setattr(library(), "paged_attention", interpreted)
    got = through_cache(model, params, rows, prompt, PagedGPU(page_size=16), piece=16)
    assert len(calls) == model.config.num_hidden_layers
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_the_kernel_cannot_do_is_refused():
    with pytest.raises(UserError, match=r"powers of 2 from 16 on, here they are 8 and 16"):
        PagedGPU().init(tiny_model().config, Shape(2, 1, 8, 32, 32))
    sliding = tiny_model(head_dim=16, layer_types=("sliding_attention",), sliding_window=5)
    with pytest.raises(UserError, match=r"does not support sliding windows"):
        PagedGPU().init(sliding.config, Shape(2, 1, 8, 32, 32))


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.skipif(aot_gpu.missing() is not None, reason=aot_gpu.missing() or "")
@pytest.mark.parametrize(
    ("memory", "dtype"),
    [
        (Paged(page_size=16), "bfloat16"),
        (PagedGPU(page_size=16), "bfloat16"),
        (PagedGPU(page_size=16), "float32"),
    ],
    ids=str,
)
def test_the_whole_loop_compiles_for_a_gpu(memory, dtype):
    function, flat = qwen_loop(memory, dtype)
    compiled = aot_gpu.compile_for_h200(function, *flat)
    assert ("paged_attention" in compiled.as_text()) == isinstance(memory, PagedGPU)
