"""The score stage: what student and teachers compute for each token of a rollout.

rollout -> SampledToken: log-probability of each sampled token, entropy at each position
-> TopK: also a support of K or more token ids
-> WholeVocabulary: also the teacher's hidden states, from which its head gives all logits
-> StudentOnly: nothing of a teacher
-> ChunkAgreement: audited chunks, and the base policy's hidden states; nothing of a teacher
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.chunks import make_chunks
from fireopd_jax.method.scoring.base import ScoreConfig, ScoreInputs
from fireopd_jax.method.scoring.supports import Kind, make_support, overlap
from fireopd_jax.method.scoring.teachers import (
    ModelScores,
    Resident,
    ScoreOptions,
)
from fireopd_jax.models.comparison import divergence_from
from fireopd_jax.ops.formulas import ReverseKL
from fireopd_jax.ops.head import LARGEST_K
from fireopd_jax.types import Array, Rollout, Scores


@config
class SampledToken(ScoreConfig):
    """Log-probability and entropy of each sampled token, by student and teacher."""

    kind: Literal["sampled_token"] = "sampled_token"


@config
class TopK(ScoreConfig):
    """`SampledToken`, and the teacher's log-probabilities on a support of likely token ids.

    References: arXiv 2603.25562 (the teacher's top-K); 2604.13016 (the student's).
    """

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1, le=LARGEST_K)] = 32
    """Size K of each model's top-K."""
    support: Kind = "teacher"
    """The support: the teacher's top-K, the student's, their union, or their intersection."""
    sampled: bool = False
    """Always include the sampled token in the support."""

    @property
    def gives(self) -> frozenset[str]:
        """Fields of `Scores` that the other stages may need."""
        return super().gives | {"support"}

    @property
    def asks_own_ids(self) -> bool:
        """Whether the student's top-K alone are the support."""
        return self.support == "student"

    @property
    def support_size(self) -> int | None:
        """K, plus one where a union or the sampled token can add a token id."""
        return self.k + (self.support == "union" or self.sampled)

    @property
    def longest_list(self) -> int:
        """Smallest vocabulary that the stage works with."""
        return self.k

    def of_student(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options with the top-K."""
        return dataclasses.replace(options, k=self.k)

    def of_teacher(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options with the top-K of a teacher."""
        return dataclasses.replace(options, k=self.k)

    def ids_for_teacher(self, student: ModelScores) -> Array | None:
        """Return the student's top-K ids where they belong to the support, else None."""
        return student.top_ids if self.support in ("student", "union") else None

    def compare(
        self,
        scores: Scores,
        student: ModelScores,
        teacher: ModelScores,
        inputs: ScoreInputs,
        options: ScoreOptions,
    ) -> Scores:
        """Return the scores with the support, and the overlap of the two top-K sets."""
        assert student.top_ids is not None and student.top_logprob is not None
        own = student.top_ids, student.top_logprob
        # A served teacher may know the log-probabilities of given ids only.
        theirs = None
        if teacher.top_ids is not None and teacher.top_logprob is not None:
            theirs = teacher.top_ids, teacher.top_logprob
        sampled = (inputs.rollout.tokens, teacher.stats.logprob) if self.sampled else None
        support = make_support(
            self.support,
            own,
            theirs,
            teacher.at_ids,
            sampled=sampled,
            size=inputs.student.model.size,
        )
        common = None if theirs is None else overlap(own, theirs)
        return dataclasses.replace(scores, support=support, overlap=common)


@config
class WholeVocabulary(ScoreConfig):
    """`SampledToken`, and the teacher's final hidden states.

    A hidden state has E values where a distribution over the vocabulary has V.
    """

    kind: Literal["whole_vocabulary"] = "whole_vocabulary"
    reverse_kl: bool = False
    """Also compute the exact KL(student || teacher) at each token, for filters that rank by it."""

    one_teacher: ClassVar[bool] = True
    only_for_readers: ClassVar[frozenset[str]] = frozenset({"teacher.hidden", "reverse_kl"})

    @property
    def gives(self) -> frozenset[str]:
        """Fields of `Scores` that the other stages may need."""
        given = {"reverse_kl"} if self.reverse_kl else set()
        return super().gives | {"teacher.hidden"} | given

    def of_student(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options with hidden states, where `reverse_kl` is computed."""
        return dataclasses.replace(options, hidden=self.reverse_kl)

    def of_teacher(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options with hidden states."""
        return dataclasses.replace(options, hidden=True)

    def compare(
        self,
        scores: Scores,
        student: ModelScores,
        teacher: ModelScores,
        inputs: ScoreInputs,
        options: ScoreOptions,
    ) -> Scores:
        """Return the scores with the teacher's hidden states, and the KL if `reverse_kl` is set."""
        scores = dataclasses.replace(scores, teacher_hidden=teacher.hidden)
        if not self.reverse_kl:
            return scores
        (judge,) = inputs.teachers
        assert isinstance(judge, Resident)  # `one_teacher`; only a resident has hidden states
        assert student.hidden is not None and teacher.hidden is not None
        exact = divergence_from(
            (judge.model, judge.params),
            teacher.hidden,
            ReverseKL(),
            student.hidden,
            inputs.student.head(inputs.mesh),
            inputs.student.head_options(inputs.temperature, options),
        )
        return dataclasses.replace(scores, reverse_kl=exact)


@config
class StudentOnly(ScoreConfig):
    """Log-probability and entropy of each sampled token, by the student alone."""

    kind: Literal["student"] = "student"

    scores_teacher: ClassVar[bool] = False


@config
class ChunkAgreement(ScoreConfig):
    """Weights of audited chunks by their agreement with a teacher's text, and an anchor.

    The teacher is not scored. A chunk's weight is pi-hat = (k + alpha pi-bar) / (N + alpha): k the
    sum of its similarities to N continuations, pi-bar its length-normalised probability by the
    student. Also the final hidden states of the base policy, for the KL on the other tokens.

    References: arXiv 2606.01476 (OmniOPD).
    """

    kind: Literal["chunk_agreement"] = "chunk_agreement"
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Strength alpha of the prior, in continuations; 0 takes the mean similarity."""

    scores_teacher: ClassVar[bool] = False
    unit_temperature: ClassVar[bool] = True
    only_for_readers: ClassVar[frozenset[str]] = frozenset({"chunks"})

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the rollout that a host stage must set."""
        return super().needs | {"rollout.audit"}

    @property
    def gives(self) -> frozenset[str]:
        """Fields of `Scores` that the other stages may need."""
        return super().gives | {"chunks", "base.hidden"}

    @property
    def needs_base(self) -> bool:
        """Whether the base policy's parameters are needed: always."""
        return True

    def of_base(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options with hidden states."""
        return dataclasses.replace(options, hidden=True)

    def of_rollout(self, scores: Scores, rollout: Rollout) -> Scores:
        """Return the scores with the audited chunks.

        Raises ValueError where the rollout was not audited.
        """
        if rollout.audit is None:
            raise ValueError("chunk_agreement needs audited responses: Rollout.audit")
        chunks = make_chunks(
            rollout.audit, scores.student.logprob, rollout.prompts.group, self.alpha
        )
        return dataclasses.replace(super().of_rollout(scores, rollout), chunks=chunks)
