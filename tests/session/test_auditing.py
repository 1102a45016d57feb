"""Audits: which prefixes the teacher is asked to continue, and what of its texts is compared."""

import dataclasses

import jax
import numpy as np
import pytest

from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.evaluation.similarity import Edit
from fireopd_jax.method.scoring.teachers import Resident, ScoreOptions, score_student
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.auditing import Auditor
from fireopd_jax.session.host import Policies
from fireopd_jax.session.refining import host_stages
from fireopd_jax.session.setup import set_up
from fireopd_jax.sharding.mesh import replicate, shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.verify import reference_stages
from tests.cases import make_rollout, make_session, random_params

ROWS, ROOM, N = 8, 24, 3
LENGTHS = [24, 0, 3, 4, 11, 24, 17, 8]
"""Row 1 drew nothing, row 2 is shorter than a chunk, row 3 is one chunk."""
SETTINGS = ["smoke", "method/omniopd", "data.path=builtin:addition-1", "eval.problems=0",
            f"rollout.batch_size={ROWS}", "rollout.group_size=2", f"rollout.max_tokens={ROOM}",
            "data.max_prompt_tokens=8", f"method.refine.continuations={N}",
            "method.refine.chunks=3", "method.refine.chunk_tokens=4"]  # fmt: skip


class Scripted:
    """A teacher that continues the i-th ask by its own chunk, by other text, or by nothing."""

    def __init__(self, session, method, how):
        self.how, self.asks = how, None

    def __call__(self, prompts, asks, policies):
        self.prompts, self.asks = prompts, asks
        return [
            [] if ask is None else [f"{i} {n}" * (n > 0) for n in range(self.how.number)]
            for i, ask in enumerate(asks)
        ]


def make_case(*settings, lengths=LENGTHS):
    setup = set_up(load_config([*SETTINGS, *settings]))
    loader = PromptLoader(
        setup.encoded, setup.train, prompts_per_step=ROWS // 2, group_size=2, seed=0
    )
    rng = np.random.default_rng(0)
    mask = np.arange(ROOM)[None] < np.asarray(lengths)[:, None]
    tokens = np.where(mask, rng.integers(48, 58, mask.shape), 0).astype(np.int32)
    rollout = dataclasses.replace(make_rollout(mask), tokens=tokens, prompts=next(loader))
    params = replicate(setup.mesh, random_params(setup.student.model))
    return setup, shard_rows(setup.mesh, rollout), Policies(params, (), np.zeros((), np.int32))


def audited(monkeypatch, *settings, lengths=LENGTHS):
    """The auditor, the rollout with its audit, and the student's entropies."""
    setup, rollout, policies = make_case(*settings, lengths=lengths)
    monkeypatch.setattr("fireopd_jax.session.auditing.ResidentSpeaker", Scripted)
    session = make_session(setup)
    session.log = [].append
    (auditor,) = host_stages(session, setup.config.method)
    assert isinstance(auditor, Auditor)
    found = auditor(rollout, policies)
    student = Resident(setup.student.model, policies.student)
    entropy = jax.jit(
        lambda rollout: score_student(student, rollout, 1.0, ScoreOptions(), None).stats.entropy
    )(rollout)
    return auditor, found, jax.device_get(entropy)


@pytest.mark.parametrize("settings", [[], ["mesh.data=1", "method.score.micro_batch_size=2"]])
def test_chunks_are_at_the_peaks_and_asked_for_after_what_is_before_them(settings, monkeypatch):
    auditor, rollout, entropy = audited(monkeypatch, *settings)
    assert {shard.data.shape[0] for shard in rollout.audit.anchor.addressable_shards} == {
        1 if not settings else ROWS
    }
    tokens, audit = jax.device_get((rollout.tokens, rollout.audit))
    speaker, setup = auditor.speaker, auditor.setup
    assert (speaker.how.number, speaker.how.max_tokens) == (N, 4)
    assert len(speaker.asks) == ROWS * 3
    oracle = reference_stages.anchors(entropy, np.asarray(rollout.mask), 3, 4)
    expected = np.array([[*starts, -1, -1, -1][:3] for starts in oracle])
    np.testing.assert_array_equal(audit.anchor, expected)
    assert (expected[[0, 5]] >= 0).all() and (expected[[1, 2]] < 0).all()
    assert expected[3].tolist() == [0, -1, -1]
    np.testing.assert_array_equal(audit.length, np.where(expected >= 0, 4, 0))
    np.testing.assert_array_equal(audit.samples, np.where(expected >= 0, N, 0))
    np.testing.assert_array_equal(speaker.prompts.sample_id, rollout.prompts.sample_id)
    for index, ask in enumerate(speaker.asks):
        row, start = index // 3, int(expected.reshape(-1)[index])
        if start < 0:
            assert ask is None and audit.agreement.reshape(-1)[index] == 0
            continue
        assert ask.row == row
        np.testing.assert_array_equal(ask.prefix, tokens[row, :start])
        own = decode(setup.student.tokenizer, tokens[row, start : start + 4].tolist())
        texts = ["", f"{index} 1", f"{index} 2"]
        alike = sum(Edit()([own] * 3, texts))
        assert audit.agreement.reshape(-1)[index] == pytest.approx(alike, abs=1e-6)
    assert audit.agreement.max() > 0


def test_a_batch_without_a_chunk_asks_nothing_and_is_not_audited(monkeypatch):
    auditor, rollout, _ = audited(monkeypatch, lengths=[0, 1, 2, 3, 3, 2, 1, 0])
    assert auditor.speaker.asks == [None] * (ROWS * 3)
    audit = jax.device_get(rollout.audit)
    assert (audit.anchor == -1).all()
    assert not audit.agreement.any() and not audit.samples.any() and not audit.length.any()


def test_texts_are_compared_by_the_students_embeddings(monkeypatch):
    """A chunk has similarity 1 with itself, and none with an empty text."""
    kind = "method.refine.similarity={kind: embedding, floor: 0.0}"

    class Repeating(Scripted):
        def __call__(self, prompts, asks, policies):
            super().__call__(prompts, asks, policies)
            return [[] if ask is None else ["", "5", "55"] for ask in asks]

    setup, rollout, policies = make_case(kind)
    rollout = dataclasses.replace(
        rollout, tokens=np.where(rollout.mask, 53, 0).astype(np.int32)
    )  # 53 is "5"
    monkeypatch.setattr("fireopd_jax.session.auditing.ResidentSpeaker", Repeating)
    session = make_session(setup)
    session.log = [].append
    auditor = Auditor(session, setup.config.method)
    audit = jax.device_get(auditor(rollout, policies).audit)
    real = audit.anchor >= 0
    np.testing.assert_allclose(audit.agreement[real], 2, atol=1e-5)
    # A function of the policies alone: that of a resumed process is the same.
    moved = jax.tree.map(lambda leaf: leaf + 1, policies.student)
    auditor(rollout, dataclasses.replace(policies, student=moved))
    again = jax.device_get(auditor(rollout, policies).audit)
    np.testing.assert_array_equal(again.agreement, audit.agreement)


@pytest.mark.parametrize(
    "room, settings, line",
    [
        (64, [], "audit: 4 chunks of 8 tokens for responses of up to 64; the paper's 10 chunks of "
         "50 are for 4096"),
        (1000, [], None),
        (64, ["method.refine.chunks=2"], "audit: 2 chunks of 8 tokens for responses of up to 64; "
         "the paper's 10 chunks of 50 are for 4096"),
        (64, ["method.refine.chunks=2", "method.refine.chunk_tokens=9"], None),
    ],
)  # fmt: skip
def test_chunks_that_were_scaled_down_are_in_the_log(room, settings, line, monkeypatch):
    plain = ["method.refine.chunks=null", "method.refine.chunk_tokens=null"]
    setup = set_up(load_config([*SETTINGS, *plain, f"rollout.max_tokens={room}", *settings]))
    monkeypatch.setattr("fireopd_jax.session.auditing.ResidentSpeaker", Scripted)
    session, said = make_session(setup), []
    session.log = said.append
    Auditor(session, setup.config.method)
    assert said == ([] if line is None else [line])
