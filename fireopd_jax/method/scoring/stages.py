"""The choices of what student and teachers say of a rollout.

rollout -> SampledToken: of the token drawn
        -> TopK: also of a support of K or more words
        -> WholeVocabulary: also the teacher's hidden states, from which its head says all
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import Float
from pydantic import Field, PositiveInt

from fireopd_jax.config import config
from fireopd_jax.method.scoring.ask import Model, Question, ask_student, ask_teachers
from fireopd_jax.method.scoring.outcomes import OutcomeMargin
from fireopd_jax.method.scoring.supports import Kind, make_support, overlap
from fireopd_jax.models.comparison import divergence_from
from fireopd_jax.ops.formulas import ReverseKL
from fireopd_jax.ops.head import LARGEST_K
from fireopd_jax.types import Array, Rollout, Scores

SAMPLED = frozenset({"student.logprob", "student.entropy", "teacher.logprob", "teacher.entropy"})


@config
class ScoreConfig:
    """How models are run to score, whatever they are asked."""

    micro_batch_size: PositiveInt | None = None
    """Rows scored at a time; by default all, or an eighth when several teachers share the batch."""
    head: Literal["reference", "chunked", "pallas_tpu", "pallas_gpu", "pallas_gpu_rows"] | None = (
        None
    )
    """Implementation of the head statistics; by default by platform and shape."""
    head_chunk: PositiveInt | None = None
    """Columns of logits that exist at a time; by default a formula of the shape."""
    base: bool = False
    """Let the base policy score the sampled tokens, too: `base`, or the student as it begins."""
    margin: OutcomeMargin | None = None
    """Grade each response against its row's answer, and hold right ones above wrong ones."""

    @property
    def gives(self) -> frozenset[str]:
        """What other stages may need."""
        given = {"base.logprob"} if self.base else set()
        return SAMPLED | given | ({"margin"} if self.margin is not None else set())

    def __call__(
        self,
        student: Model,
        teachers: Sequence[Model],
        rollout: Rollout,
        temperature: Float[Array, ""] | float,
        mesh: Mesh | None = None,
        base: Model | None = None,
    ) -> Scores:
        """Score a batch of rollouts, its rows split over the mesh where one is given."""
        plain = self._question()
        size = self.micro_batch_size
        own = ask_student(student, rollout, temperature, plain, size, mesh)
        theirs = ask_teachers(teachers, rollout, None, temperature, plain, size, mesh)
        scores = Scores(own.stats, theirs.stats, self._of_base(base, rollout, temperature, mesh))
        return jax.lax.stop_gradient(scores)

    def _question(self, k: int = 0, hidden: bool = False) -> Question:
        return Question(k, hidden, self.head, self.head_chunk)

    def _of_base(
        self,
        base: Model | None,
        rollout: Rollout,
        temperature: Array | float,
        mesh: Mesh | None,
    ):
        if not self.base:
            return None
        if base is None:
            raise ValueError("method.score.base is set, and no base policy is given")
        question, size = self._question(), self.micro_batch_size
        return ask_student(base, rollout, temperature, question, size, mesh).stats


@config
class SampledToken(ScoreConfig):
    """Log-prob of each sampled token and entropy of its distribution, by student and teacher."""

    kind: Literal["sampled_token"] = "sampled_token"


@config
class TopK(ScoreConfig):
    """The same, and the teacher's log-probabilities on a support: the words most probable.

    References: arXiv 2603.25562 (the teacher's words); 2604.13016 (the student's).
    """

    kind: Literal["top_k"] = "top_k"
    k: Annotated[int, Field(ge=1, le=LARGEST_K)] = 32
    """Words of a model's list."""
    support: Kind = "teacher"
    """Whose K words: the teacher's, the student's, those of either, or of both."""
    sampled: bool = False
    """The sampled token belongs to the support in any case."""

    @property
    def gives(self) -> frozenset[str]:
        """What other stages may need."""
        return super().gives | {"support"}

    def __call__(
        self,
        student: Model,
        teachers: Sequence[Model],
        rollout: Rollout,
        temperature: Float[Array, ""] | float,
        mesh: Mesh | None = None,
        base: Model | None = None,
    ) -> Scores:
        """Score a batch of rollouts, its rows split over the mesh where one is given."""
        question, size = self._question(k=self.k), self.micro_batch_size
        own = ask_student(student, rollout, temperature, question, size, mesh)
        words = own.top_ids if self.support in ("student", "union") else None
        theirs = ask_teachers(teachers, rollout, words, temperature, question, size, mesh)
        assert own.top_ids is not None and own.top_logprob is not None
        assert theirs.top_ids is not None and theirs.top_logprob is not None
        lists = (own.top_ids, own.top_logprob), (theirs.top_ids, theirs.top_logprob)
        support = make_support(
            self.support,
            *lists,
            theirs.at,
            sampled=(rollout.tokens, theirs.stats.logprob) if self.sampled else None,
            size=student[0].size,
        )
        scores = Scores(
            own.stats,
            theirs.stats,
            base=self._of_base(base, rollout, temperature, mesh),
            support=support,
            overlap=overlap(*lists),
        )
        return jax.lax.stop_gradient(scores)


@config
class WholeVocabulary(ScoreConfig):
    """The same as of the sampled token, and the teacher's hidden states: what its head reads.

    A state takes E numbers where the vocabulary would take V.
    """

    kind: Literal["whole_vocabulary"] = "whole_vocabulary"
    reverse_kl: bool = False
    """Compute the exact KL(student || teacher) of each token, too, for filters that rank by it."""

    @property
    def gives(self) -> frozenset[str]:
        """What other stages may need."""
        given = {"reverse_kl"} if self.reverse_kl else set()
        return super().gives | {"teacher.hidden"} | given

    def __call__(
        self,
        student: Model,
        teachers: Sequence[Model],
        rollout: Rollout,
        temperature: Float[Array, ""] | float,
        mesh: Mesh | None = None,
        base: Model | None = None,
    ) -> Scores:
        """Score a batch of rollouts, its rows split over the mesh where one is given."""
        size = self.micro_batch_size
        question = self._question(hidden=self.reverse_kl)
        own = ask_student(student, rollout, temperature, question, size, mesh)
        asked = self._question(hidden=True)
        theirs = ask_teachers(teachers, rollout, None, temperature, asked, size, mesh)
        exact = None
        if self.reverse_kl:
            network, params = student
            options = network.head_options(temperature, self.head, self.head_chunk, mesh)
            head = network.bind(params).head
            assert own.hidden is not None and theirs.hidden is not None
            pair = own.hidden, head, options
            exact = divergence_from(teachers[0], theirs.hidden, ReverseKL(), *pair)
        scores = Scores(
            own.stats,
            theirs.stats,
            base=self._of_base(base, rollout, temperature, mesh),
            teacher_hidden=theirs.hidden,
            reverse_kl=exact,
        )
        return jax.lax.stop_gradient(scores)
