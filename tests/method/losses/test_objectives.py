"""Support, sampled and whole-vocabulary losses against the oracle, from logits to gradients."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from fireopd_jax.method.batch import coefficients
from fireopd_jax.method.losses.sampled_token import (
    SampledPower,
    SampledReverseKL,
    SampledSquare,
    mean_of_later,
    power_difference,
    reward_to_go,
)
from fireopd_jax.method.losses.self_adaptation import SelfAdaptation
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.method.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.ops.formulas import ForwardKL, JensenShannon, ReverseKL
from fireopd_jax.types import Batch, Scores, Support, TokenStats
from fireopd_jax.verify import reference as oracle
from tests import cases

GOLDEN = json.loads((Path(__file__).parents[2] / "golden_objectives.json").read_text())
Z, ZQ = np.array(GOLDEN["z_student"]), np.array(GOLDEN["z_teacher"])
SUPPORT, Y = GOLDEN["teacher_support"], GOLDEN["sampled"]


def run(loss, z, z_q, support, y, base=None, divergence=None, drawn=None):
    """Return the loss of positions and its gradient to their logits, scored where z is now.

    z is [n, V], one row of the batch a position; `support` is a list of ids, -1 in empty slots.
    """
    z, z_q = (jnp.atleast_2d(jnp.asarray(x, jnp.float32)) for x in (z, z_q))
    count = len(z)
    tokens = jnp.broadcast_to(jnp.asarray(y, jnp.int32), (count,))
    ids = jnp.broadcast_to(jnp.asarray(support, jnp.int32), (count, len(support)))

    def stats(z):
        logp = jax.nn.log_softmax(z, axis=1)
        picked = jnp.take_along_axis(logp, jnp.maximum(ids, 0), axis=1)
        own = jnp.take_along_axis(logp, tokens[:, None], axis=1)
        entropy = -(jnp.exp(logp) * logp).sum(axis=1, keepdims=True)
        return TokenStats(own, entropy), jnp.where(ids >= 0, picked, -jnp.inf)[:, None]

    (student, _), (teacher, of_teacher) = stats(z), stats(z_q)
    scores = Scores(
        student,
        teacher,
        base=None if base is None else stats(jnp.atleast_2d(jnp.asarray(base, jnp.float32)))[0],
        support=Support(ids[:, None], of_teacher),
    )
    mask = np.ones((count, 1), bool)
    rollout = cases.make_rollout(mask, logprob=student.logprob if drawn is None else drawn)
    object.__setattr__(rollout, "tokens", tokens[:, None])
    batch = Batch(rollout, scores, jnp.ones((count, 1)), coefficients(mask, mask, "token"))

    def total(z):
        now, few = stats(z)
        whole = None if divergence is None else divergence(z, z_q)[:, None]
        value = loss(TokenStats(now.logprob, now.entropy, few, whole), batch)
        return value.sum(), value

    gradient, value = jax.jit(jax.grad(total, has_aux=True))(z)
    return np.asarray(value)[:, 0], np.asarray(gradient)


def of_kl(z, z_q):
    log_p, log_q = jax.nn.log_softmax(z, axis=1), jax.nn.log_softmax(z_q, axis=1)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=1)


def models(seed=0, size=12):
    z, q = np.random.default_rng(seed).normal(size=(2, size)) * 1.5
    return z, q, np.argsort(-q)[:4].tolist()


GOLDENS = {
    "local_support_renormalised": (SupportDivergence(), SUPPORT),
    "support_plus_sampled_renormalised": (SupportDivergence(), [*SUPPORT, -1, Y]),
    "score_form": (SupportDivergence(head="score"), SUPPORT),
    "thunlp_only_teacher_student_p": (SupportPolicyGradient(), [-1, *SUPPORT]),
    "tail_bucket": (SupportDivergence(head="tail_bucket"), [*SUPPORT, -1]),
    "ema_pg_corrected": (SupportDivergence(head="tail_sample"), SUPPORT),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_vectors(name):
    loss, support = GOLDENS[name]
    value, gradient = run(loss, Z, ZQ, support, Y)
    golden = GOLDEN["objectives"][name]
    np.testing.assert_allclose(value[0], golden["value"], atol=6e-7)
    np.testing.assert_allclose(gradient[0], golden["gradient"], atol=2e-6)


def test_golden_forward_terms():
    """EOPD's forward-KL term: its loss minus the sampled part."""
    sampled, d_sampled = run(SampledReverseKL(), Z, ZQ, SUPPORT, Y)
    for normalise, name in (
        (False, "forward_kl_topk_unnormalised"),
        (True, "cross_entropy_teacher_topk"),
    ):
        golden = GOLDEN["objectives"][name]
        value, gradient = run(EntropyAware(tau=0.0, normalise=normalise), Z, ZQ, SUPPORT, Y)
        np.testing.assert_allclose((gradient - d_sampled)[0], golden["gradient"], atol=2e-6)
        expected = oracle.forward_kl_topk(Z, ZQ, SUPPORT, normalise)[0]
        np.testing.assert_allclose((value - sampled)[0], expected, atol=1e-6)
        # A cross-entropy leaves out the entropy of q / Z_q, which has no gradient.
        if not normalise:
            assert golden["value"] == pytest.approx(expected, abs=1e-9)
    sure, _ = run(EntropyAware(tau=9.0), Z, ZQ, SUPPORT, Y)
    assert sure == pytest.approx(sampled, abs=1e-7)


@pytest.mark.parametrize("head", ["renormalised", "score", "tail_bucket"])
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(beta=0.3)])
def test_other_divergences_equal_oracle(head, divergence):
    z, q, support = models()
    forward = isinstance(divergence, ForwardKL)
    formula = (
        oracle.forward_kl if forward else lambda z, q: oracle.jensen_shannon(z, q, divergence.beta)
    )
    loss = SupportDivergence(head=head, divergence=divergence)
    value, gradient = run(loss, z, q, [*support, -1], 0)
    if head == "score":
        p, teacher = (np.exp(oracle.log_softmax(x)) for x in (z, q))
        inside = np.isin(np.arange(len(z)), support)
        if forward:
            slope = p - teacher
        else:
            m = 0.3 * teacher + 0.7 * p
            slope = 0.7 * p * np.log(p / m)
        expected = oracle.log_chain(p, inside * slope)
        np.testing.assert_allclose(gradient[0], expected, atol=2e-6)
        assert value[0] >= 0
        return
    exact = (oracle.renormalised if head == "renormalised" else oracle.tail_bucket)(
        z, q, support, formula
    )
    np.testing.assert_allclose(value[0], exact[0], atol=1e-6)
    np.testing.assert_allclose(gradient[0], exact[1], atol=2e-6)


@pytest.mark.parametrize("weight", ["student", "teacher", "none"])
def test_policy_gradient_weights_equal_oracle(weight):
    z, q, support = models()
    value, gradient = run(SupportPolicyGradient(weight=weight), z, q, [-1, *support, -1], 0)
    exact = oracle.weighted_score(z, q, support, weight)
    np.testing.assert_allclose(value[0], exact[0], atol=2e-6)
    np.testing.assert_allclose(gradient[0], exact[1], atol=2e-6)


@pytest.mark.parametrize("head", ["renormalised", "score", "tail_bucket"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(head):
    z, _, support = models()
    for each in (support, [support[0], -1], [-1, -1]):
        value, gradient = run(SupportDivergence(head=head), z, z, each, 0)
        assert abs(value[0]) < 1e-6 and np.abs(gradient).max() < 1e-6


def test_the_whole_vocabulary_as_support():
    z, q, _ = models()
    exact = oracle.reverse_kl(z, q)
    for head in ("renormalised", "score", "tail_bucket"):
        value, gradient = run(SupportDivergence(head=head), z, q, list(range(12)), 0)
        np.testing.assert_allclose(value[0], exact[0], atol=3e-6)
        np.testing.assert_allclose(gradient[0], exact[1], atol=3e-6)


SAMPLED = {
    "k1": (SampledReverseKL(), "reverse", "reverse"),
    "k1 with the exact baseline": (SampledReverseKL(baseline="exact_kl"), "zero", "reverse"),
    "k2": (SampledSquare(), None, "reverse"),
    "tail sample": (SupportDivergence(head="tail_sample"), "reverse", "reverse"),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_exact_expectations_over_the_whole_vocabulary(name):
    """Every token id is sampled once, weighted by its probability."""
    z, q, support = models()
    loss, of_value, of_gradient = SAMPLED[name]
    everywhere = np.tile(z, (12, 1)), np.tile(q, (12, 1))
    value, gradient = run(loss, *everywhere, support, np.arange(12), divergence=of_kl)
    p = np.exp(oracle.log_softmax(z))
    exact = {"reverse": oracle.reverse_kl(z, q), "zero": (0.0, None)}
    if of_value:
        assert (p * value).sum() == pytest.approx(exact[of_value][0], abs=2e-6)
    np.testing.assert_allclose(p @ gradient, exact[of_gradient][1], atol=2e-6)


def test_importance_weights_undo_another_sampler():
    """Tokens sampled from u and weighted by p / u have the mean under p."""
    z, q, support = models()
    u = np.full(12, 1 / 12)
    everywhere = np.tile(z, (12, 1)), np.tile(q, (12, 1))
    drawn = jnp.full((12, 1), np.log(1 / 12), jnp.float32)
    for loss in (SampledReverseKL(importance_cap=1e6), SampledSquare(importance_cap=1e6)):
        _, gradient = run(loss, *everywhere, support, np.arange(12), drawn=drawn)
        np.testing.assert_allclose(u @ gradient, oracle.reverse_kl(z, q)[1], atol=2e-6)


def test_extrapolation_equals_its_formula_and_is_plain_at_one():
    z, q, support = models()
    base = np.random.default_rng(9).normal(size=12)
    log_p, log_q, log_b = (float(oracle.log_softmax(x)[3]) for x in (z, q, base))
    advantage = 1.25 * (log_q - log_b) - (log_p - log_b)
    value, _ = run(SampledReverseKL(extrapolation=1.25), z, q, support, 3, base)
    assert value[0] == pytest.approx(-advantage, abs=1e-6)
    assert SampledReverseKL(extrapolation=1.25).needs >= {"base.logprob"}
    assert "base.logprob" not in SampledReverseKL().needs


def test_advantages_are_held_within_their_bounds():
    z, q, support = models()
    everywhere = np.tile(z, (12, 1)), np.tile(q, (12, 1))
    plain, _ = run(SampledReverseKL(), *everywhere, support, np.arange(12))
    held, _ = run(SampledReverseKL(floor=-0.5, ceiling=0.2), *everywhere, support, np.arange(12))
    np.testing.assert_allclose(held, np.clip(plain, -0.2, 0.5), atol=1e-6)
    assert np.any(plain > 0.5) and np.any(plain < -0.2)


def bregman(z, z_q, alpha):
    """Divergence from p to q of the generator x^(alpha + 1) / (alpha + 1), and its gradient."""
    p, q = (np.exp(oracle.log_softmax(x)) for x in (z, z_q))
    power = alpha + 1
    value = (p**power / power - q**power / power - q**alpha * (p - q)).sum()
    return value, oracle.log_chain(p, p * (p**alpha - q**alpha))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("normalise", [False, True])
def test_powers_have_the_mean_gradient_of_a_bregman_divergence(alpha, normalise):
    z, q, support = models()
    everywhere = np.tile(z, (12, 1)), np.tile(q, (12, 1))
    loss = SampledPower(alpha=alpha, normalise=normalise)
    _, gradient = run(loss, *everywhere, support, np.arange(12))
    p = np.exp(oracle.log_softmax(z))
    exact = bregman(z, q, alpha)[1] / (alpha if normalise else 1)
    size = np.abs(exact).max()
    np.testing.assert_allclose(p @ gradient, exact, atol=1e-5 * size)
    step = 1e-5 * np.eye(12)
    numeric = [(bregman(z + d, q, alpha)[0] - bregman(z - d, q, alpha)[0]) / 2e-5 for d in step]
    np.testing.assert_allclose(bregman(z, q, alpha)[1], numeric, atol=1e-5 * size)


def test_powers_are_bounded_and_have_the_sign_of_the_log_ratio():
    rng = np.random.default_rng(0)
    log_q, log_p = (jnp.asarray(-rng.exponential(20.0, 500), jnp.float32) for _ in range(2))
    log_q = log_q.at[:2].set(jnp.asarray([-jnp.inf, 0.0]))
    for alpha in (0.1, 1.0, 5.0, 100.0):
        value = np.asarray(power_difference(log_q, log_p, alpha), np.float64)
        q, p = (np.exp(np.asarray(x, np.float64)) for x in (log_q, log_p))
        np.testing.assert_allclose(value, q**alpha - p**alpha, rtol=1e-4, atol=1e-30)
        assert np.abs(value).max() <= 1
        seen = value != 0
        np.testing.assert_array_equal(np.sign(value)[seen], np.sign(q - p)[seen])


def test_the_limit_of_the_normalised_powers_is_the_log_ratio():
    z, q, support = models()
    everywhere = np.tile(z, (12, 1)), np.tile(q, (12, 1))
    plain = run(SampledReverseKL(), *everywhere, support, np.arange(12))
    limit = run(SampledPower(alpha=0.0, normalise=True), *everywhere, support, np.arange(12))
    for ours, theirs in zip(limit, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    near = run(SampledPower(alpha=1e-4, normalise=True), *everywhere, support, np.arange(12))
    for ours, theirs in zip(near, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JensenShannon(beta=0.3)])
def test_clipped_terms_on_a_support_equal_oracle(divergence):
    z, q, support = models()
    clip = {"pointwise_clip": 0.02}
    value, gradient = run(
        SupportDivergence(divergence=divergence, **clip), z, q, [-1, *support, -1], 0
    )
    exact = oracle.renormalised(
        z, q, support, lambda z, q: oracle.clipped(z, q, divergence.kind, 0.02, 0.3)
    )
    np.testing.assert_allclose(value[0], exact[0], atol=1e-6)
    np.testing.assert_allclose(gradient[0], exact[1], atol=2e-6)
    plain, d_plain = run(SupportDivergence(divergence=divergence), z, q, support, 0)
    assert value[0] < plain[0] and np.abs(gradient - d_plain).max() > 1e-3


def test_a_token_above_its_bound_has_the_bound_and_no_gradient():
    z, q, support = models()
    pair = np.stack([z, q]), np.stack([q, q])
    for loss in (
        SupportDivergence(token_clip=0.1),
        VocabularyDivergence(divergence=ReverseKL(), token_clip=0.1),
    ):
        value, gradient = run(loss, *pair, support, [0, 0], divergence=of_kl)
        np.testing.assert_allclose(value, [0.1, 0.0], atol=1e-6)
        assert not gradient[0].any()
        below = type(loss)(divergence=ReverseKL(), token_clip=9.0)
        free, d_free = run(below, *pair, support, [0, 0], divergence=of_kl)
        assert free[0] > 0.1 and np.abs(d_free[0]).max() > 1e-2


def test_without_a_clip_the_program_is_that_of_the_divergence():
    for divergence in (ReverseKL(), ForwardKL(), JensenShannon()):
        assert VocabularyDivergence(divergence=divergence).exact_divergence.divergence is divergence
    clipped = VocabularyDivergence(divergence=ForwardKL(), pointwise_clip=0.05)
    assert clipped.exact_divergence.divergence.limit == 0.05


def several(loss, seed=0, **options):
    """Return loss, oracle's reward and mask of rows of several tokens."""
    scores, mask, teacher = cases.random_case(seed)
    batch = Batch(
        cases.make_rollout(mask, teacher),
        scores,
        jnp.ones(mask.shape),
        coefficients(mask, mask.any(axis=1), "seq"),
    )
    student = TokenStats(scores.student.logprob, scores.student.entropy, **options)
    reward = np.where(mask, scores.teacher.logprob - scores.student.logprob, 0.0)
    return np.asarray(loss(student, batch)), reward, mask


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_reward_to_go_equals_oracle(gamma):
    value, reward, mask = several(SampledReverseKL(gamma=gamma))
    np.testing.assert_allclose(value, -oracle.reward_to_go(reward, mask, gamma), atol=1e-5)
    np.testing.assert_allclose(
        reward_to_go(jnp.asarray(reward, jnp.float32), gamma) * mask,
        oracle.reward_to_go(reward, mask, gamma),
        atol=1e-5,
    )


def test_minillm_is_the_exact_next_token_and_the_mean_reward_of_those_after():
    rng = np.random.default_rng(1)
    scores, mask, _ = cases.random_case(0)
    kl = jnp.asarray(np.where(mask, rng.exponential(size=mask.shape), np.nan), jnp.float32)
    value, reward, mask = several(MiniLLM(), divergence=kl)
    for i, t in zip(*np.nonzero(mask), strict=True):
        after = [reward[i, u] for u in range(t + 1, mask.shape[1]) if mask[i, u]]
        expected = kl[i, t] - (np.mean(after) if after else 0.0)
        assert value[i, t] == pytest.approx(float(expected), abs=1e-5)
    assert not value[~mask].any()
    ours = mean_of_later(scores.teacher.logprob - scores.student.logprob, mask)
    assert np.isfinite(ours).all() and not ours[~mask].any()


def test_what_is_masked_or_dropped_moves_nothing():
    scores, mask, teacher = cases.random_case(3)
    junk = jnp.where(mask[..., None], 0.0, jnp.nan)
    ids = jnp.asarray(np.tile([[[3, -1, 5]]], (*mask.shape, 1)), jnp.int32)
    few = jnp.asarray(np.log([[[0.2, 1e-30, 0.3]]]), jnp.float32) + junk
    support = Support(ids, few - 0.5)
    kl = scores.student.entropy
    keep = np.arange(len(mask)) != 0
    batch = Batch(
        cases.make_rollout(mask, teacher),
        Scores(scores.student, scores.teacher, support=support),
        jnp.ones(mask.shape),
        coefficients(mask, keep, "seq"),
    )

    def total(student, loss):
        value = loss(student, batch)
        return jnp.sum(jnp.where(batch.coefficient != 0, value, 0.0)), value

    for loss in (
        SupportDivergence(),
        SupportDivergence(head="tail_bucket"),
        SupportDivergence(head="tail_sample"),
        SupportPolicyGradient(),
        EntropyAware(),
        VocabularyDivergence(),
        VocabularyDivergence(token_clip=0.5),
        SupportDivergence(pointwise_clip=0.05),
        SampledPower(),
        SampledPower(alpha=0.5, normalise=True),
        SelfAdaptation(),
        MiniLLM(),
    ):
        student = TokenStats(scores.student.logprob, scores.student.entropy, few, kl)
        gradient, value = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)(student, loss)
        assert np.isfinite(np.asarray(value)).all() and not np.asarray(value)[~mask].any()
        for leaf in jax.tree.leaves(gradient):
            leaf = np.asarray(leaf)
            assert np.isfinite(leaf).all() and not leaf[~(mask & keep[:, None])].any()


FIXED = {
    "score": (SupportDivergence(head="score"), lambda p, q: np.ones_like(q)),
    "tail_bucket": (SupportDivergence(head="tail_bucket"), lambda p, q: np.ones_like(q)),
    "renormalised": (SupportDivergence(), lambda p, q: np.full_like(q, p.sum() / q.sum())),
    "forward": (EntropyAware(tau=0.0, alpha=1.0), lambda p, q: np.full_like(q, 1 / q.sum())),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_points(name):
    """Plain gradient descent on one softmax ends where the formula says."""
    loss, ratio = FIXED[name]
    z_q = jnp.asarray([ZQ], jnp.float32)
    few = jnp.asarray([[SUPPORT]], jnp.int32)

    def pick(z):
        return jax.nn.log_softmax(z, axis=1)[:, None, :][..., np.array(SUPPORT)]

    mask = np.ones((1, 1), bool)
    zero = TokenStats(jnp.zeros((1, 1)), jnp.full((1, 1), 9.0))
    scores = Scores(zero, zero, support=Support(few, pick(z_q)))
    batch = Batch(
        cases.make_rollout(mask), scores, jnp.ones((1, 1)), coefficients(mask, mask, "seq")
    )
    gradient = jax.grad(
        lambda z: loss(TokenStats(zero.logprob, zero.entropy, pick(z)), batch).sum()
    )

    @jax.jit
    def descend(z):
        return jax.lax.fori_loop(0, 20000, lambda _, z: z - 2.0 * gradient(z), z)

    p = np.exp(oracle.log_softmax(np.asarray(descend(jnp.asarray([Z], jnp.float32)))[0]))[SUPPORT]
    q = np.exp(oracle.log_softmax(ZQ))[SUPPORT]
    np.testing.assert_allclose(p / q, ratio(p, q), rtol=3e-3)


def test_bad_options_are_refused():
    for bad in ({"floor": float("inf")}, {"gamma": 1.5}, {"baseline": "mean"}):
        with pytest.raises(ValidationError):
            SampledReverseKL(**bad)
    with pytest.raises(ValidationError):
        VocabularyDivergence(divergence={"kind": "jensen_shannon", "beta": 1.5})
    with pytest.raises(ValidationError, match="alpha=0: every advantage is 0"):
        SampledPower(alpha=0.0)
    with pytest.raises(ValidationError, match="not defined for adaptive_kl"):
        VocabularyDivergence(divergence={"kind": "adaptive_kl"}, pointwise_clip=0.05)
    with pytest.raises(ValidationError, match="head=tail_bucket has other terms"):
        SupportDivergence(head="tail_bucket", pointwise_clip=0.05)
