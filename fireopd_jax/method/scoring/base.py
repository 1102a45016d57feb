"""The base of the score stages: whom they score, in which order, and what other stages may need.

rollout -> student's scores -> teachers' scores, maybe at the student's ids -> comparison -> Scores
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import Float
from pydantic import Field, PositiveInt

from fireopd_jax.config import config
from fireopd_jax.method.scoring.outcomes import OutcomeMargin
from fireopd_jax.method.scoring.teachers import (
    ModelScores,
    Resident,
    ScoreOptions,
    Teacher,
    score_student,
    score_teachers,
)
from fireopd_jax.models.packing import one_measure
from fireopd_jax.types import Array, Rollout, Scores

OF_STUDENT = frozenset({"student.logprob", "student.entropy"})
OF_TEACHER = frozenset({"teacher.logprob", "teacher.entropy"})


@dataclasses.dataclass(frozen=True)
class ScoreInputs:
    """Inputs of a score stage."""

    rollout: Rollout
    student: Resident
    teachers: Sequence[Teacher]
    temperature: Float[Array, ""] | float = 1.0
    """Temperature of the rollout; the logits of all models are divided by it."""
    mesh: Mesh | None = None
    """Devices that the rows are sharded over."""
    base: Resident | None = None
    """Base policy of a loss with extrapolation or an anchor."""
    kernel_strengths: tuple[float, float] | None = None
    """(alpha, beta) of a reweighting whose token weights the teacher's head kernel computes."""


@config
class ScoreConfig:
    """Settings that all score stages share."""

    micro_batch_size: PositiveInt | None = None
    """Rows, padded to the longest possible, per forward pass; null: rows are packed."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward pass on each device, of rows packed without padding, at least the longest
    row; null: chosen for the device, or rows are padded where `micro_batch_size` is set."""
    head: Literal["reference", "chunked", "pallas_tpu", "pallas_gpu", "pallas_gpu_rows"] | None = (
        None
    )
    """Implementation of the head statistics; by default chosen by platform and shape."""
    head_chunk: PositiveInt | None = None
    """Columns of logits computed at a time; by default a function of the shape."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Temperature of the distributions that are compared; null: `rollout.temperature`."""
    student: Literal["decode", "forward"] | None = None
    """Source of the student's scores: the decoding steps that sampled the responses, or another
    forward pass. null: `decode` for one update on new responses in float32, else `forward`."""
    base: bool = False
    """Also score the sampled tokens by the base policy: `base`, or the student at its start."""
    margin: OutcomeMargin | None = None
    """Grade each response against its row's answer, and compute the margin; null: no grading."""

    def __post_init__(self) -> None:
        """Raise ValueError where passes are measured in tokens and in rows."""
        one_measure(self.micro_batch_tokens, self.micro_batch_size)

    scores_teacher: ClassVar[bool] = True
    """Whether teachers are scored; without, `Scores.teacher` is None."""
    one_teacher: ClassVar[bool] = False
    """Whether the stage supports only a single teacher."""
    unit_temperature: ClassVar[bool] = False
    """Whether the scores are defined only for rollouts at temperature 1."""
    only_for_readers: ClassVar[frozenset[str]] = frozenset()
    """Costly fields that no metric uses: it is an error if no other stage needs any of them."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the rollout that a host stage must set."""
        return frozenset({"rollout.correct"}) if self.margin is not None else frozenset()

    @property
    def gives(self) -> frozenset[str]:
        """Fields of `Scores` that the other stages may need."""
        given = {"base.logprob"} if self.base else set()
        if self.scores_teacher:
            given |= OF_TEACHER | ({"margin"} if self.margin is not None else set())
        return OF_STUDENT | given

    @property
    def needs_base(self) -> bool:
        """Whether the base policy's parameters are needed."""
        return self.base

    @property
    def asks_own_ids(self) -> bool:
        """Whether teachers are asked for log-probabilities at token ids that the student chose."""
        return False

    @property
    def support_size(self) -> int | None:
        """Support size, compared with `TokenLoss.least_support`; None without a support."""
        return None

    @property
    def longest_list(self) -> int:
        """Smallest vocabulary that the stage works with: the K of a top-K."""
        return 1

    def __call__(self, inputs: ScoreInputs) -> Scores:
        """Return the scores of a rollout, rows sharded over the mesh where one is given."""
        rollout, temperature, size = inputs.rollout, inputs.temperature, self.micro_batch_size
        options, early = self.options(inputs.mesh), rollout.early
        if early is not None:
            student = early.student
        elif self.student == "decode":
            if rollout.policy is None:
                raise ValueError("score.student=decode needs the sampler's scores: Rollout.policy")
            student = ModelScores(rollout.policy)
        else:
            student = self.score_own(inputs.student, rollout, temperature, inputs.mesh)
        scores, teacher = Scores(student.stats, None), None
        if early is not None and early.teacher is not None:
            teacher = early.teacher
            scores = Scores(student.stats, teacher.stats)
        elif self.scores_teacher:
            of_teacher = dataclasses.replace(
                self.of_teacher(options), strengths=inputs.kernel_strengths
            )
            teacher = score_teachers(
                inputs.teachers, rollout, temperature, of_teacher, size,
                ids=self.ids_for_teacher(student), student_entropy=student.stats.entropy,
            )  # fmt: skip
            scores = Scores(student.stats, teacher.stats, token_weight=teacher.token_weight)
        if self.needs_base:
            if inputs.base is None:
                raise ValueError("the score stage has no base policy, which it needs")
            base = score_student(inputs.base, rollout, temperature, self.of_base(options), size)
            scores = dataclasses.replace(
                scores, base=base.stats if self.base else None, base_hidden=base.hidden
            )
        if teacher is not None:
            scores = self.compare(scores, student, teacher, inputs, options)
        scores = self.of_rollout(scores, rollout)
        return jax.lax.stop_gradient(scores)

    def options(self, mesh: Mesh | None) -> ScoreOptions:
        """Return the options of a forward pass that computes nothing but the tokens' statistics."""
        return ScoreOptions(
            implementation=self.head,
            chunk=self.head_chunk,
            mesh=mesh,
            pack_tokens=self.micro_batch_tokens,
        )

    def score_own(
        self,
        student: Resident,
        rollout: Rollout,
        temperature: Array | float,
        mesh: Mesh | None,
    ) -> ModelScores:
        """Return the student's scores of its responses; host stages use them, too."""
        options = self.of_student(self.options(mesh))
        return score_student(student, rollout, temperature, options, self.micro_batch_size)

    def of_student(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options of the student's forward pass."""
        return options

    def of_teacher(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options of a teacher's forward pass."""
        return options

    def of_base(self, options: ScoreOptions) -> ScoreOptions:
        """Return the options of the base policy's forward pass."""
        return options

    def ids_for_teacher(self, student: ModelScores) -> Array | None:
        """Return the token ids at which a teacher is scored besides the sampled one."""
        return None

    def compare(
        self,
        scores: Scores,
        student: ModelScores,
        teacher: ModelScores,
        inputs: ScoreInputs,
        options: ScoreOptions,
    ) -> Scores:
        """Return the scores with the fields that need both models, such as the support."""
        return scores

    def of_rollout(self, scores: Scores, rollout: Rollout) -> Scores:
        """Return the scores with the fields that need what host stages set: here, the margin."""
        return scores if self.margin is None else self.margin(scores, rollout)
