"""Audits of responses by a teacher that writes text: OmniOPD's comparison of chunks.

    rollout -> the student's entropies -> chunks at their peaks -> N continuations by the teacher
            -> similarities -> rollout with `audit`

References: arXiv 2606.01476.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Int32

from fireopd_jax.evaluation.similarity import Embed, mean_embeddings
from fireopd_jax.method import refining
from fireopd_jax.method.chunks import select
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.scoring import Resident
from fireopd_jax.models.language_model import Params
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.session.host import Policies
from fireopd_jax.session.served import ServedSpeaker
from fireopd_jax.session.session import Session
from fireopd_jax.session.speaking import Ask, Continue, ResidentSpeaker, Speaker
from fireopd_jax.sharding.mesh import by_rows, shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Array, Audit, EarlyScores, ModelScores, Rollout

PAPER_ROOM = 4096
"""Response length of the paper, from its cost per trajectory."""


class Auditor:
    """Compares chunks of responses with the teacher's continuations: `audit`."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.audit"})

    def __init__(self, session: Session, method: MethodConfig):
        refine, setup = method.refine, session.setup
        assert isinstance(refine, refining.Audit)
        self.session, self.setup, self.refine = session, setup, refine
        room = setup.config.rollout.max_tokens
        self.chunks, self.size = refine.sizes(room)
        if refine.sizes(room) != refine.sizes(PAPER_ROOM):
            session.log(
                f"audit: {self.chunks} chunks of {self.size} tokens for responses of up to {room}; "
                f"the paper's 10 chunks of 50 are for {PAPER_ROOM}"
            )
        how = Continue(refine.continuations, self.size, refine.temperature, refine.top_p)
        speaker = ServedSpeaker if setup.served else ResidentSpeaker
        self.speaker: Speaker = speaker(session, method, how)
        rows = by_rows(setup.mesh)
        self.plan = jax.jit(self._plan, out_shardings=(rows, rows))
        self.score = method.score

    def _plan(self, params: Params, rollout: Rollout) -> tuple[ModelScores, Array]:
        """Return the student's scores, and by its entropies each chunk's first position, [B, M]."""
        student = Resident(self.setup.student.model, params)
        # Conflicts are checked: the method is defined at temperature 1.
        scores = self.score.score_own(student, rollout, 1.0, self.setup.mesh)
        return scores, select(scores.stats.entropy, rollout.mask, self.chunks, self.size)

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout with `audit` set, and the student's scores as `early`."""
        student, planned = self.plan(policies.student, rollout)
        anchors = fetched(planned)
        tokens, prompts = fetched((rollout.tokens, rollout.prompts))
        asks = [
            Ask(row, tokens[row][:start].tolist()) if start >= 0 else None
            for row, starts in enumerate(anchors)
            for start in starts.tolist()
        ]
        found = self.speaker(prompts, asks, policies)
        graders = [self.setup.grader(row) for row in prompts.row.tolist()]
        audit = self._compared(tokens, anchors, found, policies, graders)
        audit = shard_rows(self.setup.mesh, audit)
        return dataclasses.replace(rollout, audit=audit, early=EarlyScores(student))

    def _compared(
        self,
        tokens: Int32[np.ndarray, "B T"],
        anchors: Int32[np.ndarray, "B M"],
        found: list[list[str]],
        policies: Policies,
        graders: Sequence[str],
    ) -> Audit:
        """Return the audit: for each chunk the sum of its similarities to the continuations."""
        tokenizer, own, others, chunk = self.setup.student.tokenizer, [], [], []
        kinds: list[str] = []
        for index, start in enumerate(anchors.reshape(-1).tolist()):
            if start >= 0:
                row = index // anchors.shape[1]
                text = decode(tokenizer, tokens[row][start : start + self.size].tolist())
                own += [text] * len(found[index])
                others += found[index]
                chunk += [index] * len(found[index])
                kinds += [graders[int(row)]] * len(found[index])
        alike = self.refine.similarity(own, others, self._embedding(policies), kinds)
        agreement = np.bincount(chunk, alike, anchors.size) if chunk else np.zeros(anchors.size)
        samples = np.bincount(chunk, minlength=anchors.size) if chunk else np.zeros(anchors.size)
        return Audit(
            anchor=anchors,
            length=np.where(anchors >= 0, self.size, 0).astype(np.int32),
            agreement=agreement.reshape(anchors.shape).astype(np.float32),
            samples=samples.reshape(anchors.shape).astype(np.float32),
        )

    def _embedding(self, policies: Policies) -> Embed | None:
        """Return vectors of texts by the student's input embeddings of this step, if used."""
        if not self.refine.similarity.embeds:
            return None
        matrix = np.asarray(policies.student["embed_tokens"], np.float32)
        return mean_embeddings(matrix, self.setup.student.tokenizer)
