"""The oracle itself: sixteen golden vectors, finite differences, expectations, identities."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from fireopd_jax.verify import reference as oracle

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_objectives.json").read_text())
Z, ZQ = np.array(GOLDEN["z_student"]), np.array(GOLDEN["z_teacher"])
SUPPORT, Y = GOLDEN["teacher_support"], GOLDEN["sampled"]

OBJECTIVES = {
    "reverse_kl": oracle.reverse_kl,
    "forward_kl": oracle.forward_kl,
    "gkd_jsd_0.5": lambda z, q: oracle.jensen_shannon(z, q, 0.5),
    "gkd_jsd_0.1": lambda z, q: oracle.jensen_shannon(z, q, 0.1),
    "skewed_forward_kl_0.1": lambda z, q: oracle.skewed_forward_kl(z, q, 0.1),
    "skewed_reverse_kl_0.1": lambda z, q: oracle.skewed_reverse_kl(z, q, 0.1),
    "local_support_renormalised": lambda z, q: oracle.renormalised(z, q, SUPPORT),
    "support_plus_sampled_renormalised": lambda z, q: oracle.renormalised(z, q, [*SUPPORT, Y]),
    "head_autodiff_counterexample": lambda z, q: oracle.head_autodiff(z, q, SUPPORT),
    "score_form": lambda z, q: oracle.score_form(z, q, SUPPORT),
    "thunlp_only_teacher_student_p": lambda z, q: oracle.weighted_score(z, q, SUPPORT, "student"),
    "tail_bucket": lambda z, q: oracle.tail_bucket(z, q, SUPPORT),
    "forward_kl_topk_unnormalised": lambda z, q: oracle.forward_kl_topk(z, q, SUPPORT),
    "cross_entropy_teacher_topk": lambda z, q: oracle.cross_entropy_topk(z, q, SUPPORT),
    "ema_pg_as_published": lambda z, q: oracle.head_and_tail_sample(z, q, SUPPORT, Y, False),
    "ema_pg_corrected": lambda z, q: oracle.head_and_tail_sample(z, q, SUPPORT, Y),
}


def models(seed=0, size=12, support=4):
    rng = np.random.default_rng(seed)
    z, q = rng.normal(size=(2, size)) * 1.5
    return z, q, sorted(np.argsort(-q)[:support].tolist())


def test_every_golden_vector_has_its_formula():
    assert set(OBJECTIVES) == set(GOLDEN["objectives"]) and len(OBJECTIVES) == 16


@pytest.mark.parametrize("name", OBJECTIVES)
def test_golden_vectors(name):
    value, gradient = OBJECTIVES[name](Z, ZQ)
    np.testing.assert_allclose(value, GOLDEN["objectives"][name]["value"], atol=1e-12)
    np.testing.assert_allclose(gradient, GOLDEN["objectives"][name]["gradient"], atol=1e-12)
    assert abs(gradient.sum()) < 1e-12


SLOPES = {
    **{
        f"clipped {kind}": functools.partial(oracle.clipped, kind=kind, limit=0.05, share=0.2)
        for kind in (
            "reverse_kl",
            "forward_kl",
            "jensen_shannon",
            "skewed_forward_kl",
            "skewed_reverse_kl",
        )
    },
    "reverse": oracle.reverse_kl,
    "forward": oracle.forward_kl,
    "jsd": lambda z, q: oracle.jensen_shannon(z, q, 0.3),
    "skewed": lambda z, q: oracle.skewed_forward_kl(z, q, 0.2),
    "skewed reverse": lambda z, q: oracle.skewed_reverse_kl(z, q, 0.2),
    "renormalised": lambda z, q: oracle.renormalised(z, q, [0, 3, 5]),
    "renormalised jsd": lambda z, q: oracle.renormalised(
        z, q, [0, 3, 5], lambda a, b: oracle.jensen_shannon(a, b, 0.4)
    ),
    "autodiff": lambda z, q: oracle.head_autodiff(z, q, [0, 3, 5]),
    "score": lambda z, q: oracle.score_form(z, q, [0, 3, 5]),
    "tail": lambda z, q: oracle.tail_bucket(z, q, [0, 3, 5]),
    "tail forward": lambda z, q: oracle.tail_bucket(z, q, [0, 3, 5], oracle.forward_kl),
    "forward top-k": lambda z, q: oracle.forward_kl_topk(z, q, [0, 3, 5]),
    "cross entropy": lambda z, q: oracle.cross_entropy_topk(z, q, [0, 3, 5]),
    "k2": lambda z, q: oracle.k2_loss(z, q, 2),
    "k3": lambda z, q: oracle.k3_loss(z, q, 2),
}


@pytest.mark.parametrize("name", SLOPES)
def test_gradients_are_slopes(name):
    """Finite differences, for all formulas without stopped gradients."""
    z, q, _ = models()
    _, gradient = SLOPES[name](z, q)
    for v in range(len(z)):
        step = np.eye(len(z))[v] * 1e-6
        slope = (SLOPES[name](z + step, q)[0] - SLOPES[name](z - step, q)[0]) / 2e-6
        assert gradient[v] == pytest.approx(slope, abs=2e-9)


def test_expectations_over_the_whole_vocabulary():
    z, q, support = models()
    (reverse, d_reverse), (forward, d_forward) = oracle.reverse_kl(z, q), oracle.forward_kl(z, q)
    zero = np.zeros(len(z))
    for function, value, gradient in (
        (oracle.k1_reward, reverse, d_reverse),
        (lambda z, q, y: oracle.k1_reward(z, q, y, reverse), 0.0, d_reverse),
        (lambda z, q, y: (0.0, oracle.score_of(z, y, 1.0)), 0.0, zero),  # k1 as a loss
        (lambda z, q, y: (0.0, oracle.k2_loss(z, q, y)[1]), 0.0, d_reverse),
        (oracle.k3_loss, reverse, d_forward),
        (
            lambda z, q, y: oracle.head_and_tail_sample(z, q, support, y),
            reverse,
            d_reverse,
        ),
    ):
        ours = oracle.expectation(function, z, q)
        assert ours[0] == pytest.approx(value, abs=1e-12)
        np.testing.assert_allclose(ours[1], gradient, atol=1e-12)
    assert forward > 0


def test_the_published_tail_gradient_lacks_that_of_the_mass():
    z, q, support = models()
    _, published = oracle.expectation(
        lambda z, q, y: oracle.head_and_tail_sample(z, q, support, y, False), z, q
    )
    p = np.exp(oracle.log_softmax(z))
    inside = np.isin(np.arange(len(p)), support)
    np.testing.assert_allclose(
        published - oracle.reverse_kl(z, q)[1], oracle.log_chain(p, inside * p), atol=1e-12
    )


def test_the_baseline_keeps_the_mean_and_lowers_the_variance():
    z, q, _ = models()
    p = np.exp(oracle.log_softmax(z))
    kl, mean = oracle.reverse_kl(z, q)

    def variance(baseline):
        each = [oracle.k1_reward(z, q, y, baseline)[1] - mean for y in range(len(p))]
        return sum(p[y] * (g**2).sum() for y, g in enumerate(each))

    assert variance(kl) < variance(0.0)


def test_the_whole_vocabulary_as_support():
    z, q, _ = models()
    whole = list(range(len(z)))
    for gradient in (
        oracle.renormalised(z, q, whole)[1],
        oracle.score_form(z, q, whole)[1],
        oracle.head_autodiff(z, q, whole)[1],
    ):
        np.testing.assert_allclose(gradient, oracle.reverse_kl(z, q)[1], atol=1e-12)


def test_the_score_over_its_mass_is_the_renormalised_gradient_and_one_of_the_mass():
    z, q, support = models()
    p, teacher = (np.exp(oracle.log_softmax(x)) for x in (z, q))
    inside = np.isin(np.arange(len(p)), support)
    of_mass = oracle.log_chain(p, inside * p / (inside * p).sum())
    value, gradient = oracle.renormalised(z, q, support)
    extra = value + np.log((inside * p).sum() / (inside * teacher).sum())
    np.testing.assert_allclose(
        oracle.weighted_score(z, q, support, "student")[1], gradient + of_mass * extra, atol=1e-12
    )


def test_a_tail_bucket_never_exceeds_the_full_divergence():
    for seed in range(20):
        z, q, support = models(seed)
        assert oracle.tail_bucket(z, q, support)[0] <= oracle.reverse_kl(z, q)[0] + 1e-12


def test_reward_to_go_by_hand():
    reward, mask = np.array([[1.0, 2.0, 4.0, 9.0]]), np.array([[True, True, True, False]])
    np.testing.assert_allclose(oracle.reward_to_go(reward, mask, 0.5), [[3.0, 4.0, 4.0, 0.0]])
    np.testing.assert_allclose(oracle.reward_to_go(reward, mask, 0.0), [[1.0, 2.0, 4.0, 0.0]])
