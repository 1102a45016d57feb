"""Sampling: frequencies against NumPy, independence of other rows, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fireopd_jax.rollout.sampling import Sampling, draw, row_keys, seed_for
from fireopd_jax.rollout.settings import RolloutConfig
from fireopd_jax.runtime.compilation import CompileCounter
from tests.rollout.filters import distribution

VOCABULARY, DRAWS = 512, 8192
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
    {"temperature": 2.5, "top_k": 400, "top_p": 0.93},
]


def sampling(seed=0, stop=(), **knobs):
    return Sampling.of(stop, 1, seed, **knobs)


def stack(samplings):
    """Return one `Sampling` with the settings of each row."""
    rows = jax.tree.map(lambda *x: jnp.stack(x), *samplings)
    return dataclasses.replace(rows, seed=samplings[0].seed)


@jax.jit
def draw_rows(logits, sampling, ids, position):
    return draw(logits, row_keys(sampling.seed, ids, position), sampling, position)


def drawn(logits, sampling, position=0, ids=None):
    logits = jnp.asarray(logits, jnp.float32)
    ids = np.arange(len(logits)) if ids is None else np.asarray(ids)
    position = jnp.asarray(position, jnp.int32)
    got = draw_rows(logits, sampling, jnp.asarray(ids, jnp.int32), position)
    return jax.tree.map(np.asarray, got)


def draw_many(sampling, logits=LOGITS, position=0):
    return drawn(np.broadcast_to(logits, (DRAWS, len(logits))), sampling, position)


def fit(counts, p):
    """Return the chi-square p-value of counts; cells expected below 5 times are pooled."""
    expected = p * counts.sum()
    rare = expected < 5
    counts, expected = (
        np.append(x[~rare], x[rare].sum()) if expected[rare].sum() > 0 else x[~rare]
        for x in (counts, expected)
    )
    statistic = ((counts - expected) ** 2 / expected).sum()
    return stats.chi2.sf(statistic, len(expected) - 1)


@pytest.mark.parametrize("knobs", KNOBS)
def test_frequencies_and_logprobs_are_of_the_filtered_distribution(knobs):
    got = draw_many(sampling(1, **knobs))
    p = distribution(LOGITS, **knobs)
    assert (p[got.token] > 0).all() and not got.bad.any()
    assert fit(np.bincount(got.token, minlength=VOCABULARY), p) > 1e-4
    np.testing.assert_allclose(got.logprob, np.log(p[got.token]), atol=2e-5)
    raw = np.log(distribution(LOGITS))
    np.testing.assert_allclose(got.model_logprob, raw[got.token], atol=2e-5)


@pytest.mark.parametrize("neighbours", ["positions", "samples"])
def test_neighbouring_draws_are_independent(neighbours):
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[::64] = [0, 0.3, -0.5, 1, 0.1, -1, 0.6, 0]
    count = np.arange(DRAWS)
    ids, position = (count, 5) if neighbours == "samples" else (np.full(DRAWS, 77), count)
    tokens = drawn(np.broadcast_to(logits, (DRAWS, VOCABULARY)), sampling(4), position, ids).token
    p = distribution(logits)[::64]
    pairs = np.bincount(tokens[::2] // 64 * 8 + tokens[1::2] // 64, minlength=64)
    assert fit(pairs, np.outer(p, p).ravel()) > 1e-4
    assert fit(np.bincount(tokens // 64, minlength=8), p) > 1e-4


def test_logprobs_of_the_support_sum_to_one():
    got = draw_many(sampling(2, top_k=5, temperature=1.5), position=3)
    tokens, first = np.unique(got.token, return_index=True)
    assert len(tokens) == 5
    assert abs(np.exp(got.logprob[first]).sum() - 1) < 1e-5


TAIL, TAIL_DRAWS, TAIL_BATCH = 131_072, 4096, 32
TAIL_LOGITS = np.full(TAIL, -18, np.float32)
TAIL_LOGITS[0] = 0


def tail_draws(one):
    """Return how many samples are among the tokens 18 nats below the first."""

    @jax.jit
    def run(logits):
        batch = jnp.broadcast_to(logits[None], (TAIL_BATCH, TAIL))

        def count(position):
            keys = row_keys(jnp.uint32(8), jnp.arange(TAIL_BATCH, dtype=jnp.int32), position)
            return (one(keys, batch, position) > 0).sum()

        return jax.lax.map(count, jnp.arange(TAIL_DRAWS // TAIL_BATCH, dtype=jnp.int32)).sum()

    return int(run(jnp.asarray(TAIL_LOGITS)))


def test_tokens_18_nats_below_the_best_are_drawn():
    knobs = sampling()
    count = tail_draws(lambda keys, logits, position: draw(logits, keys, knobs, position).token)
    expected = TAIL_DRAWS * distribution(TAIL_LOGITS)[1:].sum()
    assert 1e-4 < stats.poisson.cdf(count, expected) < 1 - 1e-4, (count, expected)


@pytest.mark.slow
def test_which_the_default_of_jax_never_does():
    count = tail_draws(lambda keys, logits, _: jax.vmap(jax.random.categorical)(keys, logits))
    assert stats.poisson.cdf(count, TAIL_DRAWS * distribution(TAIL_LOGITS)[1:].sum()) < 1e-3


def test_tokens_never_change():
    # From the first version of this sampler: a resumed run must sample the same tokens.
    wanted = {
        (300, 0): [224, 273, 249, 111, 88, 245, 249, 298],
        (300, 9): [185, 187, 213, 275, 87, 93, 90, 298],
        (5000, 0): [4846, 2225, 3251, 2850, 4580, 2693, 1986, 4133],
        (5000, 9): [4110, 286, 4503, 2194, 746, 680, 742, 4449],
    }
    for (size, position), tokens in wanted.items():
        logits = 2 * np.random.default_rng(size).standard_normal((8, size))
        assert drawn(logits, sampling(11), position).token.tolist() == tokens


def test_padding_of_the_vocabulary_changes_nothing():
    logits = 2 * np.random.default_rng(3).standard_normal((8, 5000))
    wide = np.pad(logits, ((0, 0), (0, 200)), constant_values=-np.inf)
    for knobs in ({}, {"temperature": 0.0}, {"top_p": 0.7, "top_k": 40}):
        narrow, padded = drawn(logits, sampling(**knobs)), drawn(wide, sampling(**knobs))
        np.testing.assert_array_equal(narrow.token, padded.token)
        np.testing.assert_allclose(narrow.logprob, padded.logprob, atol=1e-5)


def test_rows_of_different_knobs_draw_what_each_would_alone():
    cases = [{"temperature": 0.0}, *KNOBS, {"min_tokens": 9}, {"temperature": 0.0, "min_tokens": 9}]
    knobs = [sampling(3, (7, 200), **case) for case in cases]
    logits = 2 * np.random.default_rng(9).standard_normal((len(cases), VOCABULARY))
    position = np.arange(len(cases))
    for shift in range(12):
        together = drawn(logits, stack(knobs), position + shift, position)
        for i, own in enumerate(knobs):
            alone = drawn(logits[i : i + 1], own, i + shift, [i])
            assert together.token[i] == alone.token[0]
            np.testing.assert_allclose(together.logprob[i], alone.logprob[0], atol=2e-6)
            np.testing.assert_allclose(together.model_logprob[i], alone.model_logprob[0], atol=2e-6)


def test_rows_broadcasts_every_knob_but_the_seed():
    rows = sampling(5, (8, 9), temperature=0.5, min_tokens=3).rows(4)
    assert rows.stop.shape == (4, 8) and rows.seed.shape == ()
    assert {x.shape for x in jax.tree.leaves(rows)} == {(4,), (4, 8), ()}
    assert (np.asarray(rows.stop[:, :3]) == [8, 9, -1]).all()
    again = rows.rows(4)
    jax.tree.map(np.testing.assert_array_equal, rows, again)


def test_greedy_is_the_first_of_the_largest_whatever_the_filters():
    logits = np.tile(LOGITS, (2, 1))
    logits[:, [40, 200]] = 9
    got = drawn(logits, sampling(temperature=0.0, top_k=3, top_p=0.2, min_p=0.5))
    assert (got.token == 40).all()
    wanted = np.log(distribution(logits[0]))[40]
    np.testing.assert_allclose(got.logprob, wanted, atol=1e-5)
    np.testing.assert_array_equal(got.model_logprob, got.logprob)


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_rows_that_are_no_distribution_are_told_and_harm_no_other(knobs):
    logits = 2 * np.random.default_rng(2).standard_normal((6, VOCABULARY))
    wanted = drawn(logits, sampling(**knobs))
    assert not wanted.bad.any()
    logits[0, 130] = np.nan
    logits[2, 131] = np.inf
    logits[3] = -np.inf
    got = drawn(logits, sampling(**knobs))
    assert got.bad.tolist() == [True, False, True, True, False, False]
    for value, whole in zip(got, wanted, strict=True):
        assert (value[got.bad] == value.dtype.type(value.dtype == bool)).all()
        np.testing.assert_array_equal(value[~got.bad], whole[~got.bad])


def test_a_row_with_one_token_left_draws_it():
    logits = np.full((1, VOCABULARY), -np.inf)
    logits[0, 301] = 0.5
    for knobs in KNOBS:
        got = drawn(logits, sampling(**knobs))
        assert (got.token, got.logprob, got.bad) == (301, 0, False)


def test_no_stop_token_is_drawn_before_min_tokens():
    stop = (3, 7, 50)
    logits = np.tile(np.where(np.isin(np.arange(VOCABULARY), stop), 7, LOGITS), (DRAWS, 1))
    knobs = sampling(1, stop, min_tokens=3)
    before, after = drawn(logits, knobs, 2), drawn(logits, knobs, 3)
    assert not np.isin(before.token, stop).any() and np.isin(after.token, stop).mean() > 0.1
    np.testing.assert_array_equal(after.token, drawn(logits, sampling(1, stop), 3).token)
    masked = logits[0].copy()
    masked[list(stop)] = -np.inf
    p = distribution(masked)
    assert fit(np.bincount(before.token, minlength=VOCABULARY), p) > 1e-4
    np.testing.assert_allclose(before.logprob, np.log(p[before.token]), atol=2e-5)
    raw = np.log(distribution(logits[0]))
    np.testing.assert_allclose(before.model_logprob, raw[before.token], atol=2e-5)


def test_min_tokens_counts_each_row_and_filters_what_it_leaves():
    stop = (3, 7, 50)
    logits = np.tile(np.where(np.isin(np.arange(VOCABULARY), stop), 30, LOGITS), (4, 1))
    position = np.array([0, 2, 3, 9])
    best = int(np.argmax(np.where(np.isin(np.arange(VOCABULARY), stop), -np.inf, LOGITS)))
    for knobs in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        got = drawn(logits, sampling(0, stop, min_tokens=3, **knobs), position)
        assert (got.token[:2] == best).all() and np.isin(got.token[2:], stop).all()
    only = np.where(np.isin(np.arange(VOCABULARY), stop), 0, -np.inf)[None]
    assert drawn(only, sampling(0, stop, min_tokens=1)).bad.all()
    assert not drawn(only, sampling(0, stop)).bad.any()


def test_a_new_knob_compiles_nothing():
    cases = [sampling(seed, **knobs) for seed, knobs in enumerate([{"temperature": 0.0}, *KNOBS])]
    logits = np.tile(LOGITS, (3, 1))
    mixed = [stack(cases[i : i + 3]) for i in range(6)]
    for case in (cases[0], mixed[0]):
        drawn(logits, case)
    counter = CompileCounter()
    for case in [*cases, *mixed]:
        drawn(logits, case)
    assert counter.count == 0


def test_keys_do_not_know_the_batch():
    ids = jnp.array([3, 900, 41, 3], jnp.int32)
    keys = np.asarray(jax.random.key_data(row_keys(jnp.uint32(7), ids, jnp.int32(2))))
    wanted = [[1191937433, 2376278780], [3389912637, 465827601], [1429793076, 2595250064]]
    assert keys[:3].tolist() == wanted
    np.testing.assert_array_equal(keys[0], keys[3])
    each = row_keys(jnp.uint32(7), ids, jnp.array([2, 1, 2, 2], jnp.int32))
    same = (np.asarray(jax.random.key_data(each)) == keys).all(axis=1)
    assert same.tolist() == [True, False, True, True]
    with jax.default_prng_impl("rbg"):  # Another default generator must not matter.
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
    assert (seed_for(0, "rollout"), seed_for(0, "eval")) == (0x7B9604EA, 0x8BC41AEC)
    many = {seed_for(seed, purpose) for seed in range(50) for purpose in ("rollout", "eval", "1/x")}
    assert len(many) == 150
    assert all(0 <= value < 2**32 for value in many)


def test_too_many_stop_tokens_are_refused():
    assert (np.asarray(Sampling.of((5, 6), 1, 0, stop_slots=3).stop) == [5, 6, -1]).all()
    with pytest.raises(ValueError, match="at most 8 stop tokens"):
        Sampling.of(tuple(range(9)), 1, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"max_tokens": 0},
        {"min_tokens": -1},
    ],
)
def test_impossible_knobs_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RolloutConfig(**settings)
