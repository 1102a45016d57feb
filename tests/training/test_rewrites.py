"""Runs on rewrites: who is scored after which prompt, and the gradient on the rewrite's tokens."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.losses.vocabulary import VocabularyDivergence
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.method.scoring import WholeVocabulary
from fireopd_jax.ops.formulas import ForwardKL
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.session import Session
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.run import train
from fireopd_jax.training.update import gradients
from fireopd_jax.types import Rewritten, Writer
from tests import cases
from tests.training.test_training import BASE, MODEL, lines

TRD = [*BASE, "method/trd", "eval.problems=0", "run.steps=2", "run.completions_every=1",
       "method.refine.prompt='{problem}|{attempt}'", "optim.learning_rate=1e-2",
       "method.refine.max_prompt_tokens=96", "rollout.max_tokens=12"]  # fmt: skip
FROZEN = [f"teacher.architecture={MODEL}"]


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def distribution(model, params, tokens, length, rollout):
    """Probabilities and hidden states of each response position, in float64."""
    hidden, head = model.response_hidden(params, tokens, length, rollout.tokens, rollout.mask)
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = hidden @ head.T
    logits[..., model.size :] = -np.inf
    return softmax(logits), hidden


def run(folder, monkeypatch, *settings):
    """Train; return for each step: session, policies, rollout and scored batch, on the host."""
    seen, score, generate = [], Distillation.score, Session.generate

    def ending(self, spec, params, prompts, sampling, version, max_tokens=None, **options):
        """Random models do not end: the rewrites of every second row of the data set do here."""
        out = generate(self, spec, params, prompts, sampling, version, **options)
        if prompts.tokens.shape[1] != 96:
            return out
        tokens, mask, finished = (
            np.array(leaf) for leaf in jax.device_get((out.tokens, out.mask, out.finished))
        )
        ended = np.asarray(prompts.row) % 2 == 0
        ended &= mask.any(axis=1)
        tokens[ended, mask[ended].sum(axis=1) - 1] = spec.stop[0]
        return dataclasses.replace(out, tokens=tokens, finished=finished | ended)

    def spied(self, policies, rollout, state):
        out = score(self, policies, rollout, state)
        held = jax.tree.map(np.array, jax.device_get((policies.student, policies.teachers[0])))
        seen.append((self, *held, jax.device_get(rollout), jax.device_get(out.batch)))
        return out

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "score", spied)
        patched.setattr(Session, "generate", ending)
        train(load_config([*TRD, *settings, f"run.dir={folder}"]))
    return seen


CASES = {
    "frozen": FROZEN,
    "windows": [*FROZEN, "mesh.data=8", "rollout.window=2", "method.refine.fraction=0.5"],
    "self": [
        "method.teacher={kind: self, params: start}",
        "method.refine.prompt='{problem}|{attempt}|{reference}'",
    ],
    "lora": [
        "method.teacher={kind: self, params: ema}", "student.lora={rank: 2}",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "frozen",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("windows", "self", "lora")),
    ],
)
def test_each_model_scores_the_rewrite_after_its_own_prompt(name, tmp_path, monkeypatch):
    seen = run(tmp_path / "run", monkeypatch, *CASES[name])
    assert len(seen) == 2
    done = 0
    for distillation, student, teacher, rollout, batch in seen:
        setup = distillation.session.setup
        outcome = rollout.original.outcome
        done += (outcome == Rewritten.DONE).sum()
        mask = np.asarray(rollout.mask)
        prompts, tokens = rollout.prompts, rollout.tokens[..., None]
        spec = distillation.specs[0]
        for params, model, ids, length, ours in (
            (student, setup.student.model, prompts.tokens, prompts.length, batch.scores.student),
            (teacher, spec.model, prompts.teacher_tokens, prompts.teacher_length,
             batch.scores.teacher),
        ):  # fmt: skip
            chances, _ = distribution(model, params, ids, length, rollout)
            wanted = np.log(np.take_along_axis(chances, tokens, -1)[..., 0])
            np.testing.assert_allclose(ours.logprob[mask], wanted[mask], atol=2e-4)
        decode = setup.student.tokenizer.decode
        for i, each in enumerate(outcome):
            asked = decode(prompts.teacher_tokens[i][: prompts.teacher_length[i]])
            attempt = rollout.original.tokens[i][rollout.original.mask[i]]
            quoted = decode(attempt, skip_special_tokens=True)
            assert (f"|{quoted}" in asked) == (each == Rewritten.DONE)
            assert mask[i].any() == (each in (Rewritten.DONE, Rewritten.KEPT))
            if each == Rewritten.DONE:
                assert rollout.tokens[i][mask[i]][-1] == setup.student.stop[0]
                assert (rollout.writer[i][mask[i]] == Writer.REWRITER).all()
    assert done > 3, "some rewrites ended"
    trained = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in trained)
    assert trained[0]["refine/done_fraction"] > 0 and trained[0]["refine/nll"] > 0
    assert ("refine/leaked_fraction" in trained[0]) == (name == "self")
    file = tmp_path / "run" / "completions" / "step_000001.parquet"
    rows = pyarrow.parquet.read_table(file).to_pylist()
    # Rewrites that were dropped are there, too: without a token that is trained on.
    assert {row["refined"] for row in rows} <= {"done", "kept", "cut"} and rows
    for row in rows:
        assert (row["response"] == row["original"]) or row["refined"] != "kept"
        assert row["writer"] == ("student" if row["refined"] == "kept" else "rewriter")
        assert bool(row["tokens"]) == (row["refined"] != "cut")
    assert json.dumps(rows), "plain values"


@pytest.mark.slow
def test_a_resumed_run_rewrites_alike(tmp_path, monkeypatch):
    """A rewrite is a function of the parameters, the run's seed and the sample."""
    first = run(tmp_path / "a", monkeypatch, *CASES["self"], "run.steps=1")
    second = run(tmp_path / "b", monkeypatch, *CASES["self"], "run.steps=1")
    jax.tree.map(np.testing.assert_array_equal, first[0][3], second[0][3])


TINY = cases.tiny_model(vocab_size=19, tie_word_embeddings=False)
STUDENT, TEACHER = (cases.random_params(TINY, seed) for seed in range(2))


def make_rollout(all_dropped=False):
    """Rewrites of rows 0, 1 and 3; row 2 was dropped."""
    rng = np.random.default_rng(1)
    length = np.zeros(4, int) if all_dropped else np.array([5, 3, 0, 1])
    mask = np.arange(5)[None] < length[:, None]
    rollout = cases.make_rollout(mask)
    tokens = np.where(mask, rng.integers(0, 19, (4, 5)), 0).astype(np.int32)
    prompts = cases.make_prompts([1, 3, 2, 4], 4, vocab_size=19)
    wide = rng.integers(0, 19, (4, 9)).astype(np.int32)
    object.__setattr__(prompts, "teacher_tokens", wide)
    object.__setattr__(prompts, "teacher_length", np.array([9, 7, 2, 8], np.int32))
    object.__setattr__(rollout, "tokens", tokens)
    object.__setattr__(rollout, "prompts", prompts)
    return rollout


def gradient(rollout, teacher=TEACHER, **options):
    scores = cases.scored(WholeVocabulary(), (TINY, STUDENT), [(TINY, teacher)], rollout)
    batch, _ = cases.assembled(rollout, scores, KeepAll(), Uniform(), "token")
    loss = VocabularyDivergence(divergence=ForwardKL())
    return gradients(TINY, loss, STUDENT, batch, teacher=(TINY, teacher), **options)


@pytest.mark.parametrize("teacher", [TEACHER, STUDENT], ids=["other", "self"])
def test_the_gradient_is_p_minus_q_on_the_rewrites_tokens(teacher):
    """In float64: of the head, sum over tokens of (p - q) h / N; no gradient through q."""
    rollout = make_rollout()
    grads, metrics = gradient(rollout, teacher)
    prompts, mask = rollout.prompts, np.asarray(rollout.mask)
    p, hidden = distribution(TINY, STUDENT, prompts.tokens, prompts.length, rollout)
    q, _ = distribution(TINY, teacher, prompts.teacher_tokens, prompts.teacher_length, rollout)
    head, value = np.zeros((19, hidden.shape[-1])), 0.0
    for i, t in zip(*np.nonzero(mask), strict=True):
        head += np.outer(p[i, t] - q[i, t], hidden[i, t]) / mask.sum()
        value += (q[i, t] * np.log(q[i, t] / p[i, t])).sum() / mask.sum()
    np.testing.assert_allclose(grads["lm_head"], head, atol=1e-5)
    assert np.abs(head).max() > 1e-2 and value > 1e-2
    assert float(metrics["loss"].total) == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_chunks_of_the_vocabulary_and_micro_batches_change_nothing():
    rollout = make_rollout()
    dense, loss = gradient(rollout, head="reference")
    for options in ({"head": "chunked", "head_chunk": 8}, {"micro_batch_size": 2}):
        ours, value = gradient(rollout, **options)
        assert float(value["loss"].total) == pytest.approx(float(loss["loss"].total), rel=1e-5)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
            assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-5 * np.abs(b).max() + 1e-8


def test_without_any_rewrite_there_is_no_gradient():
    grads, metrics = gradient(make_rollout(all_dropped=True))
    assert float(metrics["loss"].total) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
