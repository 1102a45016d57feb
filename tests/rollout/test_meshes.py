"""Rollouts over data and tensor axes: the draws of one device, and what passes between devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.serving import Engine
from fireopd_jax.sharding import MeshConfig, make_mesh, place_rows, place_whole
from tests.cases import make_prompts, random_params, tiny_model

ROWS, WIDTH, ROOM = 8, 6, 8
MODEL = tiny_model(
    70, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, attention_bias=True
)
PROMPTS = make_prompts([5, 1, 3, 6, 4, 2, 5, 0], WIDTH, sample_id=10 + np.arange(ROWS))
KNOBS = {"temperature": 0.8, "top_p": 0.9}
STOP = tuple(range(3, 70, 9))


@functools.cache
def drawn(data, tensor, model=MODEL, memory=Dense()):  # noqa: B008
    """Return what a mesh draws, on the host."""
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor))
    model = dataclasses.replace(model, mesh=mesh)
    run = jax.jit(
        lambda params, prompts: generate(
            model, params, prompts, Sampling.of(STOP, ROOM, 3, **KNOBS), jnp.int32(4),
            max_tokens=ROOM, slots=3, memory=memory,
        )
    )  # fmt: skip
    rollout = run(place_whole(mesh, random_params(model)), place_rows(mesh, PROMPTS))
    return jax.device_get(rollout)


@pytest.mark.parametrize(
    ("data", "tensor", "memory"),
    [
        (4, 2, Dense()),
        (2, 4, Dense(dtype="int8")),
        (1, 8, Dense()),  # more devices than key heads: those lie whole on each
        (2, 4, Paged(page_size=8)),
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
