"""Rewrites of responses by the teacher: trajectory-refined distillation.

    response -> prompt that quotes it -> teacher samples a rewrite -> rollout of rewrites

References: arXiv 2606.08432 (TRD).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int32

from fireopd_jax.data.pipeline import pad_id, padded
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.method.refining import Rewrite
from fireopd_jax.rollout.mixing import given_rows
from fireopd_jax.rollout.sampling import Sampling, seed_for
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.session.contexts import (
    Quoting,
    Voice,
    check_context,
    longest_quoting,
    teacher_specs,
    voice_of,
    width_of,
)
from fireopd_jax.session.host import Policies, correct
from fireopd_jax.session.session import Session, generate_by_route
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.types import Original, Prompts, Rewritten, Rollout, Writer

Asked = Mapping[int, Int32[np.ndarray, " _"] | None]
"""Row -> token ids of a prompt that quotes its response; None where it does not fit."""


@dataclasses.dataclass(frozen=True)
class Rewritings:
    """The rewriter's samples for a batch, on the host."""

    prompts: Prompts
    """With the prompts that asked for them as `tokens`; length 0 where nothing was asked."""
    tokens: Int32[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    finished: Bool[np.ndarray, " B"]


class Rewriter:
    """Replaces responses by the teacher's rewrites: `original`, and all fields of a response."""

    gives: ClassVar[frozenset[str]] = frozenset({"rollout.original"})

    def __init__(self, session: Session, method: MethodConfig):
        setup, refine = session.setup, method.refine
        assert isinstance(refine, Rewrite)
        self.session, self.setup, self.refine = session, setup, refine
        self.specs = teacher_specs(setup, method)
        self.room = setup.config.rollout.max_tokens
        text = refine.prompt
        limit = refine.max_prompt_tokens or longest_quoting(setup, method, text)
        self.width = width_of(limit)
        self.longest = min(refine.max_tokens or self.room, self.room)
        for spec in self.specs:
            check_context(spec, limit, self.longest, "method.refine")
        student = setup.student.tokenizer

        def quoting(voice: Voice) -> Quoting:
            return Quoting(voice, text, limit, student)

        voices = [voice_of(spec) for spec in self.specs]
        self.asking = [quoting(voice) for voice in voices]
        self.scoring = self.asking
        if extra := refine.score_template_kwargs:
            self.scoring = [
                quoting(
                    dataclasses.replace(voice, template_kwargs={**voice.template_kwargs, **extra})
                )
                for voice in voices
            ]

    def __call__(self, rollout: Rollout, policies: Policies) -> Rollout:
        """Return the rollout of the rewrites; rows that cannot be trained on have no token."""
        own = fetched(rollout)
        real = own.mask.any(axis=1)
        kept = given_rows(own.prompts, self.refine.fraction, self._seed("which"))
        chosen = np.flatnonzero(real & ~kept).tolist()
        asked = {i: self._quoted(own, i, self.asking) for i in chosen}
        after = asked
        if self.scoring is not self.asking:
            after = {i: self._quoted(own, i, self.scoring) for i in asked}
            asked = {i: ids if after[i] is not None else None for i, ids in asked.items()}
        found = self._sample(own.prompts, asked, policies)
        outcome = self._outcomes(own, found, kept | ~real)
        return self._placed(own, found, outcome, after, np.asarray(policies.updates))

    def _seed(self, purpose: str) -> int:
        return seed_for(self.setup.config.run.seed, f"rewrite {purpose}")

    def _quoted(
        self, own: Rollout, i: int, ways: Sequence[Quoting]
    ) -> Int32[np.ndarray, " _"] | None:
        """Return the prompt that quotes response i, None if it does not fit."""
        attempt = own.tokens[i][own.mask[i]].tolist()
        row = self.setup.rows[int(own.prompts.row[i])]
        return ways[int(own.prompts.teacher[i])](row, attempt)

    def _sample(self, prompts: Prompts, asked: Asked, policies: Policies) -> Rewritings:
        """Sample a rewrite of each row that was asked for, from the teacher of its route.

        They are in the student's vocabulary: they end with its EOS.
        """
        student, rows = self.setup.student, np.arange(len(prompts.row))
        pads = [pad_id(self.specs[int(route)].tokenizer) for route in prompts.teacher]
        ids, length = padded([asked.get(i) for i in rows.tolist()], self.width, pads)
        drawn = generate_by_route(
            self.session,
            self.specs,
            policies.teachers,
            dataclasses.replace(prompts, tokens=ids, length=length),
            self._sampling,
            policies.updates,
        )
        last = np.maximum(drawn.mask.sum(axis=1) - 1, 0)
        foreign = drawn.finished & ~np.isin(drawn.tokens[rows, last], student.stop)
        tokens = np.where(drawn.mask, drawn.tokens, 0)
        tokens[rows[foreign], last[foreign]] = student.stop[0]
        # What the student would stop at ends the rewrite, even if the teacher went on.
        ends = np.isin(tokens, student.stop) & drawn.mask
        mask = drawn.mask & (np.cumsum(ends, axis=1) - ends == 0)
        # A token id that the student lacks cannot be learned: as if the rewrite had been cut.
        known = (np.where(mask, tokens, 0) < student.model.size).all(axis=1)
        return Rewritings(drawn.prompts, tokens, mask, np.asarray(ends.any(axis=1) & known))

    def _sampling(self, spec: ModelSpec) -> Sampling:
        refine = self.refine
        return self.setup.sampling(
            "rewrite",
            temperature=refine.temperature,
            top_p=refine.top_p,
            top_k=refine.top_k,
            spec=spec,
            max_tokens=self.longest,
        )

    def _outcomes(
        self, own: Rollout, found: Rewritings, kept: Bool[np.ndarray, " B"]
    ) -> Int32[np.ndarray, " B"]:
        """Return a `Rewritten` for each row."""
        ratio = found.mask.sum(axis=1) / np.maximum(own.mask.sum(axis=1), 1)
        outcome = np.full(len(kept), Rewritten.DONE, np.int32)
        if self.refine.drop_worse:
            assert own.correct is not None
            rewritten = dataclasses.replace(own, tokens=found.tokens, mask=found.mask)
            right = correct(self.setup, rewritten) > 0
            outcome[(own.correct > 0) & ~right] = Rewritten.WORSE
        outcome[ratio < self.refine.min_length_ratio] = Rewritten.SHORT
        outcome[~found.finished] = Rewritten.CUT
        outcome[np.asarray(found.prompts.length) == 0] = Rewritten.OVERLONG
        outcome[kept] = Rewritten.KEPT
        return outcome

    def _placed(
        self,
        own: Rollout,
        found: Rewritings,
        outcome: Int32[np.ndarray, " B"],
        after: Asked,
        version: Int32[np.ndarray, ""],
    ) -> Rollout:
        """Return the rollout with rewrites in the place of responses, on the devices."""
        kept, done = outcome == Rewritten.KEPT, outcome == Rewritten.DONE
        mine = kept[:, None]
        known = found.mask & (found.tokens < self.setup.student.model.size)
        new = known & done[:, None]
        zero = np.zeros_like(own.logprob)
        refined = dataclasses.replace(
            own,
            prompts=self._scored_after(own.prompts, after, done),
            # An id that the student lacks has no embedding, not even a masked one.
            tokens=np.where(mine, own.tokens, np.where(known, found.tokens, 0)),
            mask=np.where(mine, own.mask, new),
            logprob=np.where(mine, own.logprob, zero),
            model_logprob=np.where(mine, own.model_logprob, zero),
            finished=np.where(kept, own.finished, found.finished),
            version=np.where(mine, own.version, version),
            writer=np.where(mine, own.writer, np.int32(Writer.REWRITER)),
            original=Original(own.tokens, own.mask, own.model_logprob, outcome, known),
        )
        if own.correct is not None:
            refined = dataclasses.replace(refined, correct=correct(self.setup, refined))
        return shard_rows(self.setup.mesh, refined)

    def _scored_after(
        self, prompts: Prompts, after: Asked, done: Bool[np.ndarray, " B"]
    ) -> Prompts:
        """Return the prompts with those after which the teacher scores each row."""
        if self.refine.score_after == "prompt":
            return prompts
        rows = [after.get(i) if done[i] else None for i in range(len(done))]
        ids, length = padded(rows, self.width, [0] * len(rows))
        wide = max(self.width, prompts.teacher_tokens.shape[1])

        def widened(tokens: np.ndarray) -> np.ndarray:
            return np.pad(tokens, ((0, 0), (0, wide - tokens.shape[1])))

        at = done[:, None]
        return dataclasses.replace(
            prompts,
            teacher_tokens=np.where(at, widened(ids), widened(np.asarray(prompts.teacher_tokens))),
            teacher_length=np.where(done, length, prompts.teacher_length),
        )
