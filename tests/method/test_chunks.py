"""Audited chunks against plain loops: anchors, posterior weights, baselines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.chunks import chunk_sizes, make_chunks, members, posterior, prior, select
from fireopd_jax.types import Audit
from fireopd_jax.verify import reference_stages as oracle
from fireopd_jax.verify.cases import audit_arrays

ROOM = 24
jitted_select = jax.jit(select, static_argnums=(2, 3))


def make_audit(seed, length, chunks=3, size=4, samples=10):
    """Return an audit at random entropies; one chunk got no continuation."""
    rng = np.random.default_rng(seed)
    mask = np.arange(ROOM)[None] < np.asarray(length)[:, None]
    anchor = np.asarray(select(np.float32(rng.uniform(size=mask.shape)), mask, chunks, size))
    number = np.where(anchor >= 0, samples, 0).astype(np.float32)
    number[0, 1] = 0
    agreement = (number * rng.uniform(size=number.shape)).astype(np.float32)
    audit = Audit(anchor, np.where(anchor >= 0, size, 0).astype(np.int32), agreement, number)
    return audit, mask


@pytest.mark.parametrize("seed", range(25))
def test_anchors_are_those_of_the_greedy_loop(seed):
    """25 x 8 rows: ties, short rows, empty rows, and more chunks than fit."""
    rng = np.random.default_rng(seed)
    chunks, size = [(3, 4), (10, 5), (4, 1), (2, 24), (1, 30)][seed % 5]
    length = rng.integers(0, ROOM + 1, 8)
    length[:3] = 0, ROOM, max(size - 1, 0) % ROOM
    mask = np.arange(ROOM)[None] < length[:, None]
    levels = rng.integers(1, 9) if seed % 2 else 10**6
    entropy = rng.integers(0, levels, mask.shape).astype(np.float32)
    entropy = np.where(mask, entropy, np.nan)
    found = np.asarray(jitted_select(entropy, mask, chunks, size))
    expected = oracle.anchors(entropy, mask, chunks, size)
    assert found.dtype == np.int32 and found.shape == (8, chunks)
    for row, exact in zip(found.tolist(), expected, strict=True):
        assert row == exact + [-1] * (chunks - len(exact))


def test_of_equal_entropies_the_later_position_is_chosen():
    mask = np.ones((1, 9), bool)
    assert jitted_select(np.zeros((1, 9), np.float32), mask, 3, 3).tolist() == [[0, 3, 6]]
    assert jitted_select(np.zeros((1, 9), np.float32), mask, 2, 3).tolist() == [[3, 6]]
    assert jitted_select(np.zeros((1, 8), np.float32), mask[:, :8], 3, 3).tolist() == [[2, 5, -1]]


def test_an_entropy_that_is_not_finite_is_no_anchor():
    entropy = np.array([[1.0, np.nan, np.inf, 2.0, 0.5]], np.float32)
    assert jitted_select(entropy, np.ones((1, 5), bool), 5, 1).tolist() == [[0, 3, 4, -1, -1]]


def test_bfloat16_entropies_tie_like_their_values():
    rng = np.random.default_rng(0)
    entropy = jnp.asarray(rng.uniform(1, 2, (6, ROOM)), jnp.bfloat16).astype(jnp.float32)
    mask = np.ones((6, ROOM), bool)
    exact = oracle.anchors(np.asarray(entropy), mask, 4, 3)
    assert jitted_select(entropy, mask, 4, 3).tolist() == exact


def test_the_papers_sizes_shrink_with_the_response_limit():
    cases = {4096: (10, 50), 1000: (10, 50), 400: (4, 50), 64: (4, 8), 24: (4, 3), 8: (4, 1)}
    assert {room: chunk_sizes(room) for room in cases} == cases
    for room in range(1, 2000):
        chunks, size = chunk_sizes(room)
        assert chunks >= 1 and size >= 1 and chunks * size <= max(room // 2, 1)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
def test_targets_equal_the_reference_whatever_is_in_the_padding(alpha):
    audit, mask = make_audit(1, [ROOM, 20, 0, 3, 9, 15])
    rng = np.random.default_rng(2)
    logprob = np.where(mask, -rng.exponential(1.0, mask.shape), np.nan).astype(np.float32)
    group = np.array([0, 0, 0, 1, 1, 2], np.int32)
    chunks = jax.jit(functools.partial(make_chunks, alpha=alpha))(audit, logprob, group)
    exact = oracle.chunk_targets(logprob, audit_arrays(audit), group, alpha)
    ours = chunks.audited, chunks.target, chunks.prior, chunks.baseline
    for found, wanted in zip(ours, exact, strict=True):
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-7)
    # The short row and the only row of its group have no baseline; the chunk without a
    # continuation is not audited.
    assert not exact[0][3].any() and exact[3][4] == exact[3][5] == 0 < exact[3][3]
    assert exact[0][0].sum() == 2 * 4 and exact[0][1].sum() == 3 * 4


def test_the_posterior_is_its_two_readings_and_within_its_bounds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, alpha, own = rng.integers(1, 20), rng.uniform(0.1, 5), rng.uniform(0.01, 1)
        k = rng.uniform(0, n)
        inputs = (np.full((1, 1), x, np.float32) for x in (k, n, own))
        value = float(posterior(*inputs, alpha)[0, 0])
        share = n / (n + alpha)
        assert value == pytest.approx(share * k / n + (1 - share) * own, rel=1e-5)
        assert alpha * own / (n + alpha) <= value * (1 + 1e-6) and value <= 1 + 1e-6
    none, full = (np.full((1, 1), x, np.float32) for x in (0.0, 10.0))
    assert float(posterior(none, full, none + 0.5, 1.0)[0, 0]) == pytest.approx(0.5 / 11)
    assert float(posterior(full, full, none + 1, 3.0)[0, 0]) == pytest.approx(1.0)
    assert float(posterior(none, none, none, 0.0)[0, 0]) == 0.0


def test_the_prior_is_the_geometric_mean_of_the_chunks_probabilities():
    logprob = np.log(np.array([[0.5, 0.25, 0.125, 0.9]], np.float32))
    one = np.ones((1, 1), np.float32)
    audit = Audit(np.int32(0 * one), np.int32(3 * one), one, one)
    assert float(prior(logprob, audit)[0, 0]) == pytest.approx(0.25)
    certain = prior(np.zeros((1, 4), np.float32), audit)
    assert float(certain[0, 0]) == 1.0


def test_no_gradient_passes_through_targets_and_baselines():
    audit, mask = make_audit(3, [ROOM, 20, 12])
    logprob = jnp.where(mask, -1.0, 0.0)
    group = np.zeros(3, np.int32)

    def total(logprob):
        chunks = make_chunks(audit, logprob, group, 1.0)
        return (chunks.target + chunks.prior).sum() + chunks.baseline.sum()

    value, gradient = jax.value_and_grad(total)(logprob)
    assert value > 0 and not np.asarray(gradient).any()


def test_an_empty_audit_audits_nothing():
    none = np.zeros((2, 3), np.float32)
    audit = Audit(np.full((2, 3), -1, np.int32), np.zeros((2, 3), np.int32), none, none)
    assert not members(audit, 5).any()
    chunks = make_chunks(audit, np.full((2, 5), -1, np.float32), np.zeros(2, np.int32), 1.0)
    for field in dataclasses.fields(chunks):
        assert not np.asarray(getattr(chunks, field.name)).any()
