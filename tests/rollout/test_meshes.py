"""Rollouts over data and tensor axes: the tokens of one device, and little communication."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from fireopd_jax.rollout.layouts import AUTO
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.session.fits import check_cache
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate, shard_rows
from tests.cases import make_prompts, plain_kernel, random_params, tiny_model

ROWS, WIDTH, ROOM = 8, 6, 8
MODEL = tiny_model(
    70, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, attention_bias=True
)
PROMPTS = make_prompts([5, 1, 3, 6, 4, 2, 5, 0], WIDTH, sample_id=10 + np.arange(ROWS))
KNOBS = {"temperature": 0.8, "top_p": 0.9}
STOP = tuple(range(3, 70, 9))


@functools.cache
def drawn(data, tensor, memory=AUTO):
    """Return the rollout of a mesh, on the host."""
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor))
    run = jax.jit(
        lambda params, prompts: generate(
            MODEL, params, prompts, Sampling.of(STOP, ROOM, 3, **KNOBS), jnp.int32(4),
            max_tokens=ROOM, slots=3, memory=memory, mesh=mesh,
        )
    )  # fmt: skip
    rollout = run(replicate(mesh, random_params(MODEL)), shard_rows(mesh, PROMPTS))
    return jax.device_get(rollout)


@pytest.mark.parametrize(
    ("data", "tensor", "memory"),
    [
        pytest.param(4, 2, Dense(), marks=pytest.mark.slow),
        pytest.param(2, 4, Dense(dtype="int8"), marks=pytest.mark.slow),
        (1, 8, Dense()),  # more devices than key heads: these are replicated
        pytest.param(2, 4, Paged(page_size=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_mesh_draws_what_one_device_draws(data, tensor, memory):
    wanted = drawn(1, 1, memory=memory)
    assert 0 < wanted.finished.sum() < ROWS - 1 and len(set(wanted.mask.sum(axis=1))) > 2
    got = drawn(data, tensor, memory=memory)
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.mask, wanted.mask)
    np.testing.assert_allclose(got.logprob, wanted.logprob, atol=1e-5)
    np.testing.assert_allclose(got.model_logprob, wanted.model_logprob, atol=1e-5)


def engine(data, tensor, model=MODEL):
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor))
    made = Engine(model, width=WIDTH, room=ROOM, seed=3, slots=2, rows=4, chunk_steps=5, mesh=mesh)
    made.load(replicate(mesh, random_params(model)), version=4)
    return made


@pytest.mark.slow
def test_the_engine_of_a_mesh_draws_what_one_device_draws():
    made, wanted = engine(2, 2), drawn(1, 1)
    knobs = Knobs(stop=STOP, max_tokens=ROOM, **KNOBS)
    real = [i for i in range(ROWS) if PROMPTS.length[i]]
    got = made.generate(
        [Request(10 + i, PROMPTS.tokens[i, : PROMPTS.length[i]], knobs) for i in real]
    )
    for i, each in zip(real, got, strict=True):
        np.testing.assert_array_equal(each.tokens, wanted.tokens[i][wanted.mask[i]])


def test_devices_of_a_replica_tell_one_another_sums_not_logits_nor_caches():
    """Each of two devices has half of the heads, of the MLP and of the vocabulary."""
    made = engine(2, 2, dataclasses.replace(MODEL, vocab_size=5000))
    kept = jax.tree.leaves(made._state.cache)
    assert all(leaf.sharding.shard_shape(leaf.shape)[2] == leaf.shape[2] // 2 for leaf in kept)
    decode_params = made._params
    table = decode_params["embed_tokens"]
    assert table.shape[0] == 5120 and table.sharding.shard_shape(table.shape)[0] == 2560
    for name, axis in {"q_proj": 1, "k_proj": 1, "o_proj": 0}.items():
        kernel = decode_params["layers"][0]["self_attn"][name]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[axis] == kernel.shape[axis] // 2
    (program,) = made._runs.values()
    text = program.as_text()
    moved = re.findall(r"= \(?\w+\[([0-9,]*)\][^=]*? (?:all-gather|all-to-all)\(", text)
    sizes = [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in moved]
    assert "all-reduce" in text and sizes
    # Gathered are the block masses of two slots, and the largest logits of each shard.
    assert max(sizes) < 2 * table.shape[0] / 8


def test_meshes_that_the_devices_cannot_form_are_refused():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    with pytest.raises(UserError, match=r"mesh\.tensor=3: does not divide the 8 devices"):
        make_mesh(MeshConfig(tensor=3))
    assert make_mesh(MeshConfig(data=2, tensor=3)).size == 6
    with pytest.raises(UserError, match=r"mesh\.data x mesh\.tensor: 12 devices asked for, 8"):
        make_mesh(MeshConfig(data=4, tensor=3))


def test_a_cache_is_split_where_its_kernel_can_be(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config = load_config(["smoke", "rollout.cache.kind=paged_tpu"])
    for tensor in (1, 4):
        check_cache(config, make_mesh(MeshConfig(tensor=tensor)), {"student": MODEL.config})
    with pytest.raises(UserError, match=r"^b: .*=paged_tpu: mesh\.tensor=8 does not divide its 4 "):
        check_cache(config, make_mesh(MeshConfig(tensor=8)), {"b": MODEL.config})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = load_config(["smoke", "rollout.cache.kind=paged_gpu"])
    with pytest.raises(UserError, match=r"its kernel does not support mesh\.tensor=2"):
        check_cache(config, make_mesh(MeshConfig(tensor=2)), {})


def test_on_a_tpu_each_device_of_a_replica_runs_the_kernel_on_its_own_heads(monkeypatch):
    monkeypatch.setattr(kernel, "ragged_paged_attention", plain_kernel)
    got, wanted = drawn(2, 4, memory=PagedTPU(page_size=8)), drawn(1, 1, memory=AUTO)
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_allclose(got.logprob, wanted.logprob, atol=1e-5)


def test_a_model_that_a_cache_cannot_hold_is_named(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = load_config(["smoke", "rollout.cache.kind=dense_gpu"])
    half, whole = tiny_model(dtype="bfloat16").config, tiny_model().config
    check_cache(config, make_mesh(MeshConfig()), {"student": half})
    with pytest.raises(UserError, match=r"^b: rollout\.cache\.kind=dense_gpu supports bfloat16"):
        check_cache(config, make_mesh(MeshConfig()), {"student": half, "b": whole})
    small = load_config(["smoke", "rollout.cache={kind: paged, tokens: 2000}"])
    check_cache(small, make_mesh(MeshConfig()), {"student": whole})
