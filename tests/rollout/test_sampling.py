"""What is drawn: filters and frequencies against plain NumPy, and keys that know no batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fireopd_jax.compilation import CompileCounter
from fireopd_jax.rollout.sampling import (
    Sampling,
    block_gumbel,
    draw,
    filter_logits,
    row_keys,
    stream,
)
from fireopd_jax.rollout.settings import RolloutConfig

VOCABULARY, DRAWS = 300, 8192
LOGITS = (2 * np.random.default_rng(0).standard_normal(VOCABULARY)).astype(np.float32)
LOGITS[[3, 50, 51, 299]] = LOGITS[7]

KNOBS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.02},
]


def sampling(seed=0, **knobs):
    return Sampling.of((), 1, seed, **knobs)


def keep(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Tell by sorting which tokens stay: top-k, then top-p of what is left, then min-p."""
    logits = np.asarray(logits, np.float64)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = [i for i in order[: top_k or None] if logits[i] > -np.inf]
    mass = [math.exp(logits[i] - logits[order[0]]) for i in order]
    kept, before = [], 0.0
    for i, m in zip(order, mass, strict=True):
        if not kept or ((before < top_p * sum(mass) or top_p >= 1) and m >= min_p):
            kept.append(i)
        before += m
    return kept


def distribution(logits, temperature=1.0, **filters):
    """Give the probabilities that should be drawn from."""
    z = np.asarray(logits, np.float64) / temperature
    kept = keep(z, **filters)
    p = np.zeros(len(z))
    p[kept] = np.exp(z[kept] - z.max())
    return p / p.sum()


@jax.jit
def draw_many(sampling, logits, position):
    keys = row_keys(sampling.seed, jnp.arange(DRAWS, dtype=jnp.int32), position)
    return draw(jnp.broadcast_to(logits[None], (DRAWS, len(logits))), keys, sampling)


def fit(tokens, p):
    """Give the chi-square p-value of the counts; tokens expected less than 5 times share a bin."""
    counts, expected = np.bincount(tokens, minlength=len(p)), p * len(tokens)
    rare = expected < 5
    counts, expected = (
        np.append(x[~rare], x[rare].sum()) if expected[rare].sum() > 0 else x[~rare]
        for x in (counts, expected)
    )
    statistic = ((counts - expected) ** 2 / expected).sum()
    return stats.chi2.sf(statistic, len(expected) - 1)


@pytest.mark.parametrize("knobs", KNOBS)
def test_frequencies_and_logprobs_are_of_the_filtered_distribution(knobs):
    drawn = jax.tree.map(np.asarray, draw_many(sampling(1, **knobs), LOGITS, jnp.int32(0)))
    p = distribution(LOGITS, **knobs)
    assert (p[drawn.token] > 0).all()
    assert fit(drawn.token, p) > 1e-4
    np.testing.assert_allclose(drawn.logprob, np.log(p[drawn.token]), atol=2e-5)
    raw = np.log(distribution(LOGITS))
    np.testing.assert_allclose(drawn.model_logprob, raw[drawn.token], atol=2e-5)


def test_logprobs_of_the_support_sum_to_one():
    drawn = draw_many(sampling(2, top_k=5, temperature=1.5), LOGITS, jnp.int32(3))
    tokens, first = np.unique(drawn.token, return_index=True)
    assert len(tokens) == 5
    assert abs(np.exp(np.asarray(drawn.logprob)[first]).sum() - 1) < 1e-5


def test_a_new_knob_compiles_nothing():
    cases = [sampling(seed, **knobs) for seed, knobs in enumerate([{"temperature": 0.0}, *KNOBS])]
    draw_many(cases[0], LOGITS, jnp.int32(0))
    counter = CompileCounter()
    for case in cases:
        draw_many(case, LOGITS, jnp.int32(0)).token.block_until_ready()
    assert counter.count == 0


def test_tokens_18_nats_below_the_best_are_drawn():
    # Noise of the default resolution ends near 16 and draws them hardly ever. 255 blocks of one
    # token each: these sample ids were found by search among two million.
    logits = np.full((1, 255 * 16), -np.inf, np.float32)
    logits[0, ::16] = -18
    logits[0, 0] = 0
    ids = jnp.array([177991, 341183, 379839, 429487, 1283453, 1484557], jnp.int32)
    keys = row_keys(jnp.uint32(0), ids, jnp.int32(0))
    tokens = np.asarray(block_gumbel(keys, jnp.tile(logits, (len(ids), 1))))
    assert (tokens > 0).all() and (tokens % 16 == 0).all(), tokens


def rows():
    """Logits of every kind: spread, tied, flat, forbidden, peaked, odd in number."""
    rng = np.random.default_rng(5)
    spread = 2 * rng.standard_normal((3, 41))
    tied = rng.integers(0, 3, (2, 41)).astype(float)
    flat = np.zeros((1, 41))
    forbidden = np.where(rng.random((1, 41)) < 0.7, -np.inf, 2 * rng.standard_normal((1, 41)))
    alone = np.full((1, 41), -np.inf)
    alone[0, 11] = 0.5
    peaked = np.zeros((1, 41))
    peaked[0, 20] = 30
    return np.concatenate([spread, tied, flat, forbidden, alone, peaked]).astype(np.float32)


FILTER = jax.jit(filter_logits)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 41},
        {"top_k": 1000},
        {"top_p": 1.0},
        {"top_p": 0.51},
        {"top_p": 1e-6},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 12, "top_p": 0.77},
        {"top_k": 12, "top_p": 0.93, "min_p": 0.15},
    ],
)
def test_filters_equal_sorting(filters):
    logits = rows()
    got = np.asarray(FILTER(logits, sampling(**filters)))
    for i, row in enumerate(logits):
        wanted = np.full_like(row, -np.inf)
        kept = keep(row, **filters)
        wanted[kept] = row[kept]
        np.testing.assert_array_equal(got[i], wanted, err_msg=f"row {i}")


def test_greedy_is_the_first_of_the_largest_whatever_the_filters():
    logits = LOGITS.copy()
    logits[[40, 200]] = 9
    drawn = draw_many(sampling(temperature=0.0, top_k=3, top_p=0.2), logits, jnp.int32(0))
    assert (np.asarray(drawn.token) == 40).all()
    wanted = np.log(distribution(logits))[40]
    np.testing.assert_allclose(drawn.logprob, wanted, atol=1e-5)
    np.testing.assert_allclose(drawn.model_logprob, wanted, atol=1e-5)


def test_keys_do_not_know_the_batch():
    ids = jnp.array([3, 900, 41, 3], jnp.int32)
    keys = jax.random.key_data(row_keys(jnp.uint32(7), ids, jnp.int32(2)))
    turned = jax.random.key_data(row_keys(jnp.uint32(7), ids[::-1][:3], jnp.int32(2)))
    np.testing.assert_array_equal(keys[::-1][:3], turned)
    np.testing.assert_array_equal(keys[0], keys[3])
    with jax.default_prng_impl("rbg"):  # faster on some accelerators, and not a function of the key
        np.testing.assert_array_equal(
            keys, jax.random.key_data(row_keys(jnp.uint32(7), ids, jnp.int32(2)))
        )


def test_keys_differ_by_seed_sample_and_position():
    ids = jnp.arange(20, dtype=jnp.int32)
    keys = [
        jax.random.key_data(row_keys(jnp.uint32(seed), ids, jnp.int32(position)))
        for seed in (0, 1)
        for position in range(3)
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * 3 * 20


def test_streams_are_distinct_and_never_change():
    assert (stream(0, "rollout"), stream(0, "eval")) == (0x7B9604EA, 0x8BC41AEC)
    many = {stream(seed, purpose) for seed in range(50) for purpose in ("rollout", "eval", "1/x")}
    assert len(many) == 150
    assert all(0 <= value < 2**32 for value in many)


def test_too_many_stop_tokens_are_refused():
    assert (np.asarray(Sampling.of((5, 6), 1, 0, stop_slots=3).stop) == [5, 6, -1]).all()
    with pytest.raises(ValueError, match="at most 8 stop tokens"):
        Sampling.of(tuple(range(9)), 1, 0)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}, {"max_tokens": 0}],
)
def test_impossible_knobs_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RolloutConfig(**settings)
