"""Supports and overlaps against Python sets, and the scores of a batch by two models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.scoring import TopK, WholeVocabulary
from fireopd_jax.method.scoring.supports import make_support, overlap
from tests import cases


def make_lists(seed=0, rows=3, tokens=4, k=5, size=9, lacking=True):
    """Return both models' lists, in falling order, and log q over the whole vocabulary."""
    rng = np.random.default_rng(seed)
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(jnp.asarray(z), axis=-1), np.float32)
        for z in rng.normal(size=(2, rows, tokens, size))
    )

    def of(logp):
        ids = np.argsort(-logp, axis=-1)[..., :k].astype(np.int32)
        values = np.take_along_axis(logp, ids, axis=-1)
        if lacking:  # a model with fewer than k words
            ids[0, 0, 3:], values[0, 0, 3:] = -1, -np.inf
        return jnp.asarray(ids), jnp.asarray(values)

    return of(log_p), of(log_q), log_p, log_q


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["teacher", "student", "union", "intersection"])
def test_supports_equal_sets(kind, sampled):
    student, teacher, _, log_q = make_lists()
    own, theirs = np.asarray(student[0]), np.asarray(teacher[0])
    at_own = np.take_along_axis(log_q, np.maximum(own, 0), axis=-1)
    drawn = np.random.default_rng(5).integers(0, 9, own.shape[:2]).astype(np.int32)
    of_drawn = np.take_along_axis(log_q, drawn[..., None], axis=-1)[..., 0]
    token = (jnp.asarray(drawn), jnp.asarray(of_drawn)) if sampled else None
    support = make_support(kind, student, teacher, jnp.asarray(at_own), sampled=token, size=8)
    for at in np.ndindex(own.shape[:2]):
        s, t = (set(ids[at].tolist()) - {-1} for ids in (own, theirs))
        wanted = {"teacher": t, "student": s, "union": s | t, "intersection": s & t}[kind]
        wanted = {v for v in wanted if v < 8} | ({int(drawn[at])} if sampled else set())
        ids = np.asarray(support.ids[at])
        found = ids[ids >= 0].tolist()
        assert sorted(found) == sorted(wanted)  # each once
        np.testing.assert_allclose(
            np.asarray(support.teacher[at])[ids >= 0], log_q[at][found], rtol=1e-6
        )
        assert np.all(np.asarray(support.teacher[at])[ids < 0] == -np.inf)


@pytest.mark.parametrize("seed", range(3))
def test_overlap_equals_sets(seed):
    student, teacher, log_p, log_q = make_lists(seed)
    ours = overlap(student, teacher)
    own, theirs = np.asarray(student[0]), np.asarray(teacher[0])
    for at in np.ndindex(own.shape[:2]):
        common = sorted((set(own[at].tolist()) & set(theirs[at].tolist())) - {-1})
        p, q = np.exp(log_p[at][common]), np.exp(log_q[at][common])
        assert ours.ratio[at] == pytest.approx(len(common) / 5)
        assert ours.student_mass[at] == pytest.approx(p.sum(), rel=1e-5)
        assert ours.teacher_mass[at] == pytest.approx(q.sum(), rel=1e-5)
        p, q = p / p.sum() if common else p, q / q.sum() if common else q
        advantage = np.mean(p * np.log(q / p)) if common else 0.0
        assert ours.advantage[at] == pytest.approx(advantage, abs=1e-6)


def test_nothing_in_common_is_zero():
    ids = jnp.asarray([[[0, 1]]], jnp.int32)
    few = jnp.log(jnp.asarray([[[0.5, 0.25]]], jnp.float32))
    apart = overlap((ids, few), (ids + 2, few))
    assert all(float(leaf[0, 0]) == 0 for leaf in jax.tree.leaves(apart))


def test_a_student_that_is_its_teacher_overlaps_wholly():
    ids = jnp.asarray([[[0, 1]]], jnp.int32)
    few = jnp.log(jnp.asarray([[[0.5, 0.25]]], jnp.float32))
    same = overlap((ids, few), (ids, few))
    assert float(same.ratio[0, 0]) == 1 and float(same.advantage[0, 0]) == pytest.approx(0)
    assert float(same.student_mass[0, 0]) == pytest.approx(0.75)


MODEL = cases.tiny_model()
STUDENT, TEACHER = (cases.random_params(MODEL, seed) for seed in range(2))


def make_rollout():
    mask = np.arange(5)[None] < np.array([5, 3, 0, 1])[:, None]
    rollout = cases.make_rollout(mask)
    tokens = np.random.default_rng(0).integers(0, 32, mask.shape).astype(np.int32)
    object.__setattr__(rollout, "tokens", jnp.asarray(tokens))
    object.__setattr__(rollout, "prompts", cases.make_prompts([3, 2, 1, 3], 4))
    return rollout


def log_softmax_of(params, theirs):
    rollout = make_rollout()
    p = rollout.prompts
    prompt = (p.teacher_tokens, p.teacher_length) if theirs else (p.tokens, p.length)
    hidden, head = MODEL.response_hidden(params, *prompt, rollout.tokens, rollout.mask)
    return np.asarray(jax.nn.log_softmax(hidden @ head.T, axis=-1))


@pytest.mark.parametrize("kind", ["teacher", "union"])
def test_scores_hold_the_support(kind):
    stage = TopK(k=4, support=kind, micro_batch_size=2)
    scores = jax.jit(lambda s, t, r: cases.scored(stage, (MODEL, s), [(MODEL, t)], r, 1.0))(
        STUDENT, TEACHER, make_rollout()
    )
    log_p, log_q = log_softmax_of(STUDENT, False), log_softmax_of(TEACHER, True)
    mask = np.asarray(make_rollout().mask)
    for at in zip(*np.nonzero(mask), strict=True):
        s, t = (set(np.argsort(-x[at])[:4].tolist()) for x in (log_p, log_q))
        ids = np.asarray(scores.support.ids[at])
        found = ids[ids >= 0].tolist()
        assert set(found) == (t if kind == "teacher" else s | t)
        np.testing.assert_allclose(
            np.asarray(scores.support.teacher[at])[ids >= 0], log_q[at][found], atol=1e-4
        )
        assert scores.overlap.ratio[at] == pytest.approx(len(s & t) / 4)


def test_scores_hold_the_teachers_states_and_the_base():
    stage = WholeVocabulary(base=True)
    rollout = make_rollout()
    scores = cases.scored(
        stage, (MODEL, STUDENT), [(MODEL, TEACHER)], rollout, 1.0, base=(MODEL, TEACHER)
    )
    p = rollout.prompts
    hidden, _ = MODEL.response_hidden(
        TEACHER, p.teacher_tokens, p.teacher_length, rollout.tokens, rollout.mask
    )
    np.testing.assert_allclose(scores.teacher_hidden, hidden, atol=1e-5)
    own = np.asarray(rollout.mask)
    plain = cases.response_stats(MODEL, TEACHER, p.tokens, p.length, rollout.tokens, rollout.mask)
    np.testing.assert_allclose(
        np.asarray(scores.base.logprob)[own], np.asarray(plain.logprob)[own], atol=1e-5
    )
    with pytest.raises(ValueError, match="no base policy"):
        cases.scored(stage, (MODEL, STUDENT), [(MODEL, TEACHER)], rollout, 1.0)
