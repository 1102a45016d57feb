"""FiRe-OPD's token weights from the head kernel: the path that `max_scope=vocabulary` takes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.reweighting import ConfidenceConfusion, SoftTrajectories, Uniform
from fireopd_jax.method.scoring import SampledToken, TopK, WholeVocabulary, teachers
from fireopd_jax.types import StageContext
from fireopd_jax.verify import reference_batch as oracle
from tests import cases

VOCABULARY, ROWS = 24, 6
MODEL = cases.tiny_model(vocab_size=VOCABULARY)
STUDENT, *TEACHERS = (cases.random_params(MODEL, seed) for seed in range(3))
LENGTH = np.array([5, 3, 0, 1, 5, 4])
MASK = np.arange(5)[None] < LENGTH[:, None]
ROUTE = np.array([0, 1, 1, 0, 1, 0], np.int32)
REWEIGHT = ConfidenceConfusion(alpha=0.7, beta=1.3, max_scope="vocabulary")


def make_rollout():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, MASK.shape).astype(np.int32)
    prompts = cases.make_prompts(rng.integers(1, 4, ROWS), 4, vocab_size=VOCABULARY, teacher=ROUTE)
    return dataclasses.replace(cases.make_rollout(MASK, ROUTE), tokens=tokens, prompts=prompts)


def scores_of(stage, strengths, count=2):
    score = functools.partial(cases.scored, stage, kernel_strengths=strengths)
    pairs = [(MODEL, each) for each in TEACHERS[:count]]
    return jax.jit(lambda rollout: score((MODEL, STUDENT), pairs, rollout))(make_rollout())


def exact_weights(scores, alpha, beta):
    """The raw weight with log V in place of both maxima, in plain Python."""
    top = math.log(VOCABULARY)
    out = np.zeros(MASK.shape)
    for i, t in zip(*np.nonzero(MASK), strict=True):
        entropies = (float(x.entropy[i, t]) for x in (scores.teacher, scores.student))
        out[i, t] = oracle.raw_weight(*entropies, top, top, alpha, beta)
    return out


@pytest.mark.parametrize("head", ["reference", "chunked"])
@pytest.mark.parametrize("count, micro_batch_size", [(1, None), (1, 2), (2, None), (2, 3)])
def test_scoring_takes_the_weights_from_the_kernel(head, count, micro_batch_size):
    stage = SampledToken(head=head, micro_batch_size=micro_batch_size)
    scores = scores_of(stage, REWEIGHT.kernel_strengths, count)
    plain = scores_of(stage, None, count)
    assert plain.token_weight is None
    exact = exact_weights(plain, 0.7, 1.3)
    np.testing.assert_allclose(np.where(MASK, scores.token_weight, 0), exact, rtol=1e-5)
    for ours, theirs in ((scores.teacher, plain.teacher), (scores.student, plain.student)):
        np.testing.assert_allclose(ours.logprob[MASK], theirs.logprob[MASK], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [TopK(k=4), WholeVocabulary()], ids=["top_k", "vocabulary"])
def test_other_scores_take_them_too(stage):
    scores = scores_of(stage, (1.0, 1.0), count=1)
    exact = exact_weights(scores, 1.0, 1.0)
    np.testing.assert_allclose(np.where(MASK, scores.token_weight, 0), exact, rtol=1e-5)


def test_the_kernel_is_asked_with_the_students_entropies(monkeypatch):
    asked = []
    plain = teachers.head_topk

    def watched(*arguments, **options):
        asked.append((options["k"], options.get("alpha"), options.get("beta")))
        assert options["student_entropy"].shape == MASK.shape
        return plain(*arguments, **options)

    monkeypatch.setattr(teachers, "head_topk", watched)
    scores_of(SampledToken(head_chunk=8), REWEIGHT.kernel_strengths, count=1)
    assert asked == [(1, 0.7, 1.3)]


def test_the_reweighting_uses_what_the_kernel_computed():
    scores = scores_of(SampledToken(), REWEIGHT.kernel_strengths)
    context = StageContext(MASK, ROUTE, 2, VOCABULARY)
    keep = MASK.any(axis=1)
    weight = np.asarray(REWEIGHT.weight(scores, context, keep))
    raw = exact_weights(scores, 0.7, 1.3)
    mean = raw.sum(axis=1, keepdims=True) / np.maximum(LENGTH, 1)[:, None]
    np.testing.assert_allclose(weight, np.where(MASK, raw / np.where(mean, mean, 1), 0), rtol=1e-5)
    # Other weights from the kernel, other weights of the loss: no second computation hides them.
    ramp = jnp.where(MASK, 1.0 + jnp.arange(5.0)[None], 0.0)
    other = REWEIGHT.weight(dataclasses.replace(scores, token_weight=ramp), context, keep)
    np.testing.assert_allclose(other[0], (1 + np.arange(5)) / (1 + np.arange(5)).mean(), rtol=1e-6)
    # Without a kernel the same weights come from the entropies.
    bare = REWEIGHT.weight(dataclasses.replace(scores, token_weight=None), context, keep)
    np.testing.assert_allclose(bare, weight, rtol=1e-5)


def test_who_asks_for_the_kernels_weights():
    assert REWEIGHT.kernel_strengths == (0.7, 1.3)
    assert ConfidenceConfusion().kernel_strengths is None
    assert Uniform().kernel_strengths is None and SoftTrajectories().kernel_strengths is None
