"""Filters without sorting: the same tokens as by sorting, and no sort in the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.rollout import cutoff
from fireopd_jax.rollout.columns import Columns
from fireopd_jax.rollout.sampling import Sampling, _keep, _knobs, _shape, draw, row_keys
from tests.rollout.filters import kept

SMALL, LARGE = 41, 3001
"""Fewer tokens than candidates, and so many that most thresholds are beyond the candidates."""


def rows(size):
    """Return logits that are spread, tied, flat, banned, single, peaked, and signed zeros."""
    rng = np.random.default_rng(5)
    spread = [2 * rng.standard_normal(size) for _ in range(2)]
    narrow = 0.05 * rng.standard_normal(size) - 7
    tied = rng.integers(0, 3, size).astype(float)
    forbidden = np.where(rng.random(size) < 0.7, -np.inf, 2 * rng.standard_normal(size))
    alone = np.full(size, -np.inf)
    alone[size // 2] = 0.5
    peaked = np.zeros(size)
    peaked[size // 3] = 30
    steep = -np.linspace(0, 300, size)[rng.permutation(size)]
    zeros = np.where(rng.random(size) < 0.5, -0.0, 0.0)
    zeros[size // 4 :: 2] = -1
    kinds = [*spread, narrow, tied, np.zeros(size), forbidden, alone, peaked, steep, zeros]
    return np.stack(kinds).astype(np.float32)


@jax.jit
def keep(logits, sampling):
    """Return the mask of the tokens that the sampler may draw."""
    columns = Columns(logits.shape[1])
    knobs = _knobs(sampling.rows(len(logits)), jnp.zeros(len(logits), jnp.int32))
    blocks = columns.split(logits)
    weights, cut, _ = _shape(blocks, knobs, columns)
    z = blocks * knobs.inverse_temperature[:, None, None]
    z = _keep(z, columns.ids(), weights.top, cut, knobs.log_min_p)
    return (z > -jnp.inf).reshape(len(logits), -1)[:, : columns.width]


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 256},
    {"top_k": 257},
    {"top_k": 1500},
    {"top_k": 3001},
    {"top_k": 10_000},
    {"top_p": 1.0},
    {"top_p": 0.999},
    {"top_p": 0.517},
    {"top_p": 1e-6},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.77},
    {"top_k": 12, "top_p": 0.93, "min_p": 0.15},
    {"top_k": 900, "top_p": 0.313},
    {"top_k": 900, "top_p": 0.913, "min_p": 0.3},
    {"top_p": 0.313, "min_p": 0.9},
]


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("filters", FILTERS)
def test_filters_equal_sorting(filters, size):
    logits = rows(size)
    got = np.asarray(keep(logits, Sampling.of((), 1, 0, **filters)))
    for i, row in enumerate(logits):
        np.testing.assert_array_equal(got[i], kept(row, **filters), err_msg=f"row {i}")


def test_filters_apply_after_the_temperature():
    logits = rows(LARGE)[:1]
    for temperature in (0.3, 0.7, 3.0):
        filters = {"top_p": 0.83, "min_p": 0.01}
        got = np.asarray(keep(logits, Sampling.of((), 1, 0, temperature=temperature, **filters)))
        cold = np.float32(1) / np.float32(temperature)
        np.testing.assert_array_equal(got[0], kept(logits[0] * cold, **filters))


def test_any_number_of_candidates_gives_the_same(monkeypatch):
    logits = rows(300)
    filters = FILTERS[:2] + FILTERS[7:]
    for count in (1, 16, 150, 151):
        monkeypatch.setattr(cutoff, "CANDIDATES", count)
        run = jax.jit(keep.__wrapped__)
        for case in filters:
            got = np.asarray(run(logits, Sampling.of((), 1, 0, **case)))
            wanted = np.stack([kept(row, **case) for row in logits])
            np.testing.assert_array_equal(got, wanted, err_msg=f"{count} candidates, {case}")


def test_what_is_drawn_is_kept_at_any_temperature():
    # A quotient that rounds differently in two places would lose the token at the threshold.
    logits = rows(LARGE)[:3]
    run = jax.jit(lambda z, k, s, p: draw(z, row_keys(s.seed, k, p), s, p))
    ids = jnp.arange(3, dtype=jnp.int32)
    for temperature in np.geomspace(0.05, 20, 30):
        for filters in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
            knobs = Sampling.of((), 1, 0, temperature=float(temperature), **filters)
            got = run(logits, ids, knobs, jnp.int32(0))
            np.testing.assert_array_equal(got.token, logits.argmax(axis=1))
            np.testing.assert_array_equal(got.logprob, 0)


def test_the_compiled_program_sorts_no_vocabulary_and_copies_no_logits():
    size = 16_384
    knobs = Sampling.of((1, 2), 1, 0)
    text = jax.jit(lambda z, k, s, p: draw(z, row_keys(s.seed, k, p), s, p)).lower(
        jnp.zeros((2, size)), jnp.arange(2, dtype=jnp.int32), knobs, jnp.int32(0)
    ).compile().as_text()  # fmt: skip
    sorts = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* sort\(", text)
    assert all(int(shape.split(",")[-1]) < 1024 for shape in sorts), sorts
    copies = re.findall(r"= f32\[([\d,]*)\]\S* copy\(", text)
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in copies]
    assert max(sizes, default=0) < 2 * size, copies
