"""The dense cache in cuDNN's layout: equal to the plain one, and it compiles."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.rollout import kv_dense_gpu
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_dense_gpu import DenseGPU
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.state import Shape
from fireopd_jax.rollout.streaming import Engine
from tests import aot_gpu
from tests.cases import make_prompts, qwen_loop, random_params, through_cache, tiny_model

MODEL = tiny_model(num_hidden_layers=2, head_dim=16, num_attention_heads=4)
PARAMS = random_params(MODEL)
RNG = np.random.default_rng(0)


@pytest.fixture
def by_xla(monkeypatch):
    """Run the same JAX function by XLA instead of cuDNN, and so in float32 as well."""
    monkeypatch.setattr(DenseGPU, "implementation", "xla")
    monkeypatch.setattr(kv_dense_gpu, "TYPES", ("float32",))


@pytest.mark.usefixtures("by_xla")
def test_what_it_attends_to_is_what_a_plain_cache_holds():
    prompt = np.array([9, 1, 16], np.int32)
    rows = [RNG.integers(0, 32, length + 4).astype(np.int32) for length in prompt]
    wanted = through_cache(MODEL, PARAMS, rows, prompt, Dense(), piece=16)
    got = through_cache(MODEL, PARAMS, rows, prompt, DenseGPU(), piece=16)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("by_xla")
def test_an_engine_draws_the_same_also_when_the_cache_grows(monkeypatch):
    monkeypatch.setattr("fireopd_jax.rollout.engine_programs.GROW_FROM", 64)
    lengths = RNG.integers(1, 9, 6)
    requests = [
        Request(i, RNG.integers(0, 32, length).astype(np.int32), Knobs(max_tokens=10 + 8 * i))
        for i, length in enumerate(lengths)
    ]

    def answers(memory):
        engine = Engine(MODEL, width=8, room=56, seed=0, slots=2, memory=memory, chunk_steps=8)
        engine.load(PARAMS)
        assert engine.programs == 3
        return engine.generate(requests)

    for one, other in zip(answers(DenseGPU()), answers(Dense()), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_what_cudnn_cannot_do_is_refused():
    with pytest.raises(UserError, match=r"supports bfloat16 .* this model has float32 and 16"):
        DenseGPU().init(MODEL.config, Shape(2, 1, 8, 32, 32))
    wide = tiny_model(dtype="bfloat16", head_dim=256)
    with pytest.raises(UserError, match=r"up to 128, this model has bfloat16 and 256"):
        DenseGPU().init(wide.config, Shape(2, 1, 8, 32, 32))
    sliding = tiny_model(
        dtype="bfloat16", head_dim=16, layer_types=("sliding_attention",), sliding_window=5
    )
    with pytest.raises(UserError, match=r"does not support sliding windows"):
        DenseGPU().init(sliding.config, Shape(2, 1, 8, 32, 32))


@pytest.fixture
def cudnn(monkeypatch):
    """Fake the cuDNN version: JAX queries it in this process, which has no cuDNN."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)


@pytest.mark.aot
@pytest.mark.usefixtures("cudnn")
@pytest.mark.skipif(aot_gpu.missing() is not None, reason=aot_gpu.missing() or "")
def test_the_whole_loop_compiles_for_a_gpu():
    function, flat = qwen_loop(DenseGPU())
    assert "__cudnn$fmha" in aot_gpu.compile_for_h200(function, *flat).as_text()


@pytest.mark.aot
@pytest.mark.usefixtures("cudnn")
@pytest.mark.skipif(aot_gpu.missing() is not None, reason=aot_gpu.missing() or "")
def test_it_compiles_for_a_replica_on_each_of_two_gpus():
    model = tiny_model(dtype="bfloat16", head_dim=64)
    prompts = make_prompts([3, 5, 1, 4], 5)

    def respond(params):
        sampling = Sampling.of((), 8, 0)
        return generate(
            model,
            params,
            prompts,
            sampling,
            jnp.int32(0),
            max_tokens=8,
            memory=DenseGPU(),
            mesh=aot_gpu.mesh(2),
        ).tokens

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert "__cudnn$fmha" in aot_gpu.compile_for_h200(respond, shapes, gpus=2).as_text()
