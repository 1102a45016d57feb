"""Score stages without a teacher: the student alone, and audited chunks with a base policy."""

import dataclasses

import jax
import numpy as np
import pytest

from fireopd_jax.method.scoring import ChunkAgreement, SampledToken, StudentOnly
from fireopd_jax.method.scoring.outcomes import OutcomeMargin
from fireopd_jax.verify import reference_stages as oracle
from fireopd_jax.verify.cases import audit_arrays, make_audit
from tests import cases

MODEL = cases.tiny_model(vocab_size=19)
STUDENT, BASE, TEACHER = (cases.random_params(MODEL, seed) for seed in range(3))
LENGTH = np.array([6, 3, 0, 1, 5, 4])


def make_rollout():
    rng = np.random.default_rng(0)
    rollout = cases.make_rollout(np.arange(6)[None] < LENGTH[:, None])
    prompts = cases.make_prompts(rng.integers(1, 4, 6), 4, vocab_size=19)
    return dataclasses.replace(
        rollout,
        prompts=dataclasses.replace(prompts, group=np.int32([0, 0, 1, 1, 1, 2])),
        tokens=rng.integers(0, 19, (6, 6)).astype(np.int32),
        audit=make_audit(LENGTH),
    )


def score(stage, rollout, **known):
    return jax.jit(
        lambda s, b, r: cases.scored(stage, (MODEL, s), [], r, base=(MODEL, b), **known)
    )(STUDENT, BASE, rollout)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_scores_hold_the_chunks_and_the_bases_states_and_nothing_of_a_teacher(micro_batch_size):
    stage = ChunkAgreement(alpha=2.0, micro_batch_size=micro_batch_size)
    rollout = make_rollout()
    scores, p = score(stage, rollout), rollout.prompts
    assert scores.teacher is None and scores.base is None and scores.teacher_hidden is None
    own = cases.response_stats(MODEL, STUDENT, p.tokens, p.length, rollout.tokens, rollout.mask)
    arrays = audit_arrays(rollout.audit)
    exact = oracle.chunk_targets(np.asarray(own.logprob), arrays, p.group, 2.0)
    chunks = scores.chunks
    found = chunks.audited, chunks.target, chunks.prior, chunks.baseline
    for ours, wanted in zip(found, exact, strict=True):
        np.testing.assert_allclose(np.asarray(ours), wanted, rtol=1e-5, atol=1e-6)
    assert exact[0].sum() > 4
    hidden, _ = MODEL.response_hidden(BASE, p.tokens, p.length, rollout.tokens, rollout.mask)
    at = np.asarray(rollout.mask)
    np.testing.assert_allclose(
        np.asarray(scores.base_hidden)[at], np.asarray(hidden)[at], atol=1e-5
    )


def test_the_bases_log_probs_are_scored_if_wanted():
    rollout = make_rollout()
    scores, p = score(ChunkAgreement(base=True), rollout), rollout.prompts
    plain = cases.response_stats(MODEL, BASE, p.tokens, p.length, rollout.tokens, rollout.mask)
    at = np.asarray(rollout.mask)
    np.testing.assert_allclose(
        np.asarray(scores.base.logprob)[at], np.asarray(plain.logprob)[at], atol=1e-5
    )


def test_the_student_alone_is_scored_as_beside_a_teacher():
    rollout = make_rollout()
    alone = score(StudentOnly(), rollout)
    both = cases.scored(SampledToken(), (MODEL, STUDENT), [(MODEL, TEACHER)], rollout)
    at = np.asarray(rollout.mask)
    for field in ("logprob", "entropy"):
        ours, theirs = (np.asarray(getattr(x.student, field))[at] for x in (alone, both))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert alone.teacher is None and both.teacher is not None and alone.chunks is None


def test_stages_say_what_they_give_and_need():
    of_student = {"student.logprob", "student.entropy"}
    assert StudentOnly().gives == of_student and not StudentOnly().needs_base
    # A margin compares advantages, which need a teacher.
    assert StudentOnly(margin=OutcomeMargin()).gives == of_student
    assert ChunkAgreement().gives == of_student | {"chunks", "base.hidden"}
    assert ChunkAgreement(base=True).gives == ChunkAgreement().gives | {"base.logprob"}
    assert ChunkAgreement().needs == {"rollout.audit"} and ChunkAgreement().needs_base
    assert SampledToken(base=True).needs_base and not SampledToken().needs_base


def test_what_is_missing_is_named():
    rollout = make_rollout()
    with pytest.raises(ValueError, match=r"Rollout\.audit"):
        score(ChunkAgreement(), dataclasses.replace(rollout, audit=None))
    with pytest.raises(ValueError, match="no base policy"):
        cases.scored(ChunkAgreement(), (MODEL, STUDENT), [], rollout)
