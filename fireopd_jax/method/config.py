"""The configuration of a method: its teacher, refinement, scoring, filter, reweighting and loss.

refine -> score -> filter, reweight, loss; the score must provide the fields that these need
"""

from typing import Annotated

from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.batch import StageStates, init_states
from fireopd_jax.method.filtering import AllOf, Filters, TeacherQuantile
from fireopd_jax.method.losses.base import TokenLoss
from fireopd_jax.method.losses.chunks import ChunkPolicyGradient
from fireopd_jax.method.losses.sampled_token import SampledPower, SampledReverseKL, SampledSquare
from fireopd_jax.method.losses.self_adaptation import SelfAdaptation
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.method.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.method.refining import NoRefine, Refines
from fireopd_jax.method.reweighting import (
    ConfidenceConfusion,
    Progressive,
    SoftTrajectories,
    Uniform,
)
from fireopd_jax.method.scoring import (
    ChunkAgreement,
    SampledToken,
    StudentOnly,
    TopK,
    WholeVocabulary,
)
from fireopd_jax.method.stage import Aggregate, Filter, Reweighting
from fireopd_jax.method.teachers import Frozen, Teachers


@config
class MethodConfig:
    """The choices that make a method; FiRe-OPD by default."""

    teacher: Teachers = Frozen()
    """Whose distribution the student learns, and the prompt after which it is computed."""
    refine: Refines = NoRefine()
    """What happens to a rollout before it is scored."""
    score: Annotated[
        SampledToken | TopK | WholeVocabulary | StudentOnly | ChunkAgreement,
        Field(discriminator="kind"),
    ] = SampledToken()
    """What student and teachers compute for each token of a rollout."""
    filter: Annotated[Filters | AllOf, Field(discriminator="kind")] = TeacherQuantile()
    """Which trajectories, or tokens, are trained on."""
    reweight: Annotated[
        Uniform | ConfidenceConfusion | Progressive | SoftTrajectories,
        Field(discriminator="kind"),
    ] = ConfidenceConfusion()
    """Weight of each token in the loss."""
    loss: Annotated[
        SampledReverseKL
        | SampledSquare
        | SampledPower
        | SelfAdaptation
        | SupportDivergence
        | SupportPolicyGradient
        | EntropyAware
        | VocabularyDivergence
        | MiniLLM
        | ChunkPolicyGradient,
        Field(discriminator="kind"),
    ] = SampledReverseKL()
    """Per-token loss."""
    aggregate: Aggregate = "seq"
    """Each kept trajectory counts once (`seq`), or each kept token (`token`)."""

    @property
    def readers(self) -> tuple[Filter | Reweighting | TokenLoss, ...]:
        """The stages that use the scores: filter, reweighting and loss."""
        return self.filter, self.reweight, self.loss

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the scores that these stages use."""
        return frozenset().union(*(stage.needs for stage in self.readers))

    @property
    def asked_of_rollout(self) -> frozenset[str]:
        """Fields of the rollout that host stages must set before it is scored."""
        leak = {"rollout.leaked"} if self.privileged and self.teacher.leak is not None else set()
        return self.refine.gives | self.refine.needs | self.score.needs | leak

    @property
    def privileged(self) -> bool:
        """Whether the method uses the rows' privileged solutions."""
        return self.teacher.privileged or self.refine.privileged

    @property
    def follows_progress(self) -> bool:
        """Whether a stage depends on the share of the run's updates that are done."""
        return self.filter.follows_progress

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts whose token ids the stages need, as `StageContext.special`."""
        return tuple(text for stage in self.readers for text in stage.texts)

    def init(self, batch_size: int) -> StageStates:
        """Return the stages' states before the first step, for batches of `batch_size` rows."""
        return init_states(self.filter, self.reweight, batch_size)
