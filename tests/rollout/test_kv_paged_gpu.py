"""Pages as the GPU's kernel wants them: its meaning is that of plain pages, and it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU, library
from fireopd_jax.rollout.loop import Loop
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import Shape, empty_requests, initial
from tests import aot_gpu
from tests.cases import random_params, through_cache, tiny_model


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
    with pytest.raises(UserError, match=r"a power of 2 from 16 on, here they are 8 and 16"):
        PagedGPU().init(tiny_model().config, 2, 1, 32)
    sliding = tiny_model(head_dim=16, layer_types=("sliding_attention",), sliding_window=5)
    with pytest.raises(UserError, match=r"no sliding window"):
        PagedGPU().init(sliding.config, 2, 1, 32)


@pytest.mark.aot
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.skipif(aot_gpu.missing() is not None, reason=aot_gpu.missing() or "")
@pytest.mark.parametrize("memory", [Paged(page_size=16), PagedGPU(page_size=16)], ids=str)
def test_the_whole_loop_compiles_for_a_gpu(memory):
    config = tiny_model(
        hidden_size=1024,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        dtype="bfloat16",
    ).config
    model = LanguageModel(config, 151936)
    shape = Shape.of(64, 256, 768, 16, memory.align)
    loop = Loop(model, memory, shape.piece)

    def start(key):
        params = model.relay(model.init(key))
        requests = empty_requests(64, 256, 768, Sampling.of((), 768, 0))
        cache = memory.init(config, shape.slots, shape.entries, shape.capacity)
        return params, initial(requests, shape.slots, shape.entries, cache)

    params, state = jax.eval_shape(start, jax.random.key(0))
    flat, tree = jax.tree.flatten((params, state, jnp.int32(0), jnp.int32(0)))
    compiled = aot_gpu.compile_for_h200(
        lambda *leaves: loop.run(*jax.tree.unflatten(tree, leaves)), *flat
    )
    assert ("paged_attention" in compiled.as_text()) == isinstance(memory, PagedGPU)
