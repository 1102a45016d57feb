"""The vocabulary sharded over a mesh axis: the same tokens, with little communication."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fireopd_jax.rollout.sampling import Sampling, draw, row_keys

ROWS, SIZE = 400, 8192
KNOBS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5},
    {"top_k": 1000, "top_p": 0.6},
    {"temperature": 5.0, "top_p": 0.8},
    {"min_p": 0.02},
    {"min_tokens": 3},
    {"temperature": 0.0, "min_tokens": 3},
]


def one(logits, ids, sampling, axis=None):
    position = jnp.int32(1)
    return draw(logits, row_keys(sampling.seed, ids, position), sampling, position, axis)


def sharded(data, vocabulary, knobs):
    mesh = jax.make_mesh((data, vocabulary), ("data", "vocabulary"), (AxisType.Auto,) * 2)
    specs = jax.tree.map(lambda knob: P("data") if knob.ndim else P(), knobs)
    return jax.jit(
        jax.shard_map(
            lambda *x: one(*x, axis="vocabulary"),
            mesh=mesh,
            in_specs=(P("data", "vocabulary"), P("data"), specs),
            out_specs=P("data"),
        )
    )


def case(size=SIZE, rows=ROWS):
    """Return logits with ties across all shards, and various sampling settings."""
    logits = 3 * np.random.default_rng(0).standard_normal((rows, size))
    logits[: rows // 4] = np.round(logits[: rows // 4])
    stop = tuple(int(token) for token in np.argsort(-logits[-1])[:3])
    each = [Sampling.of(stop, 1, 6, **KNOBS[i % len(KNOBS)]) for i in range(rows)]
    knobs = jax.tree.map(lambda *x: jnp.stack(x), *each)
    knobs = dataclasses.replace(knobs, seed=each[0].seed)
    return jnp.asarray(logits, jnp.float32), jnp.arange(rows, dtype=jnp.int32), knobs


def compare(got, wanted):
    np.testing.assert_array_equal(got.token, wanted.token)
    np.testing.assert_array_equal(got.bad, wanted.bad)
    np.testing.assert_allclose(got.logprob, wanted.logprob, atol=3e-6)
    np.testing.assert_allclose(got.model_logprob, wanted.model_logprob, atol=3e-6)


@pytest.mark.parametrize("data, vocabulary", [pytest.param(1, 8, marks=pytest.mark.slow), (2, 4)])
def test_shards_draw_the_same_tokens(data, vocabulary):
    logits, ids, knobs = case()
    logits = logits.at[3, 5000].set(jnp.nan).at[9].set(-jnp.inf)
    wanted = jax.jit(one)(logits, ids, knobs)
    assert np.flatnonzero(wanted.bad).tolist() == [3, 9]
    compare(sharded(data, vocabulary, knobs)(logits, ids, knobs), wanted)


@pytest.mark.parametrize("size", [500, 1000], ids=["ranked whole", "searched"])
def test_narrow_shards_of_a_padded_vocabulary_draw_the_same_tokens(size):
    logits, ids, knobs = case(size=size, rows=72)
    wanted = jax.jit(one)(logits, ids, knobs)
    padded = jnp.pad(logits, ((0, 0), (0, -size % 128)), constant_values=-jnp.inf)
    compare(sharded(1, 8, knobs)(padded, ids, knobs), wanted)


def test_no_logits_travel():
    logits, ids, knobs = case(rows=9)
    text = sharded(1, 8, knobs).lower(logits, ids, knobs).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute"
    sent = re.findall(rf"= \(?\w+\[([\d,]*)\][^=]* (?:{kinds})(?:-start)?\(", text)
    numbers = [np.prod([int(n) for n in shape.split(",") if n]) for shape in sent]
    # 64 block masses for each row; with a filter, 256 candidates of each shard.
    assert len(sent) > 3 and set(numbers) <= {9, 18, 9 * 64, 9 * 256 * 8}, sent


def test_a_shard_that_cuts_a_block_is_refused():
    logits, ids, knobs = case(size=8 * 520, rows=8)
    with pytest.raises(ValueError, match="4160 in 8 shards has 520 columns a shard; expected a mu"):
        sharded(1, 8, knobs)(logits, ids, knobs)
