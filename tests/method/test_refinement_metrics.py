"""Metrics of rewrites against the responses that they replace, and of leaks."""

import dataclasses

import numpy as np
import pytest

from fireopd_jax.method.diagnostics import of_batch
from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.metrics import results
from fireopd_jax.types import Original, Rewritten
from tests import cases

OWN = np.array([4, 2, 4, 3, 0, 6, 4])
"""Lengths of the student's responses; the fifth row is empty."""
OUTCOME = [Rewritten.DONE, Rewritten.DONE, Rewritten.CUT, Rewritten.KEPT, Rewritten.KEPT,
           Rewritten.DONE, Rewritten.WORSE]  # fmt: skip
NEW = np.array([2, 4, 0, 3, 0, 6, 0])


def metrics(leaked=None, outcome=OUTCOME):
    rng = np.random.default_rng(0)
    own, new = (np.arange(6)[None] < lengths[:, None] for lengths in (OWN, NEW))
    logprob = -rng.exponential(1.0, own.shape).astype(np.float32)
    before = -rng.exponential(1.0, own.shape).astype(np.float32)
    tokens = rng.integers(0, 3, (2, *own.shape)).astype(np.int32)
    rollout = dataclasses.replace(
        cases.make_rollout(new),
        tokens=tokens[0],
        original=Original(tokens[1], own, before, np.asarray(outcome, np.int32), own),
        leaked=leaked,
    )
    entropy = np.ones(own.shape)
    scores = cases.make_scores(logprob, logprob, entropy, entropy)
    batch, keep = cases.assembled(rollout, scores, KeepAll(), Uniform(), "token")
    return results(of_batch(batch, keep, 6)), (own, new, logprob, before, tokens)


def test_lengths_and_likelihoods_are_of_the_rows_that_were_asked_for():
    values, (own, new, logprob, before, tokens) = metrics()
    done, asked = np.array([0, 1, 5]), np.array([0, 1, 2, 5, 6])
    for name, share in {"done": 3, "cut": 1, "worse": 1, "overlong": 0, "short": 0}.items():
        assert values[f"refine/{name}_fraction"] == pytest.approx(share / 5)
    assert "refine/kept_fraction" not in values and "refine/leaked_fraction" not in values
    assert values["refine/length_ratio"] == pytest.approx(np.median([2 / 4, 4 / 2, 6 / 6]))
    assert values["refine/original_length"] == pytest.approx(OWN[asked].mean())
    assert values["refine/nll"] == pytest.approx(-logprob[done][new[done]].mean(), rel=1e-5)
    assert values["refine/nll_original"] == pytest.approx(
        -before[asked][own[asked]].mean(), rel=1e-5
    )
    both = (new & own)[done]
    same = (tokens[0] == tokens[1])[done][both]
    assert values["refine/same_tokens"] == pytest.approx(same.mean())


def test_without_any_rewrite_the_metrics_are_no_numbers_but_no_error():
    values, _ = metrics(outcome=[Rewritten.KEPT] * 7)
    assert np.isnan(values["refine/done_fraction"]) and np.isnan(values["refine/nll"])


def test_leaks_are_a_fraction_of_the_rows():
    values, _ = metrics(leaked=np.array([True, False, False, True, False, False, False]))
    assert values["refine/leaked_fraction"] == pytest.approx(2 / 7)
