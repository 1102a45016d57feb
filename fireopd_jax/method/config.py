"""A method as its choices: who scores, what is kept, how tokens are weighed, the loss.

score -> filter, reweight, loss; what these need the score must give
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.method.filtering import AllOf, Filters, TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL, SampledSquare
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.method.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.method.reweighting import (
    ConfidenceConfusion,
    Progressive,
    SoftTrajectories,
    Uniform,
)
from fireopd_jax.method.scoring import SampledToken, TopK, WholeVocabulary


@config
class MethodConfig:
    """Who scores, what is kept, how tokens are weighed, and the loss. FiRe-OPD by default."""

    score: Annotated[SampledToken | TopK | WholeVocabulary, Field(discriminator="kind")] = (
        SampledToken()
    )
    """What student and teachers say of a rollout."""
    filter: Annotated[Filters | AllOf, Field(discriminator="kind")] = TeacherQuantile()
    """Which trajectories, or tokens, the student learns from."""
    reweight: Annotated[
        Uniform | ConfidenceConfusion | Progressive | SoftTrajectories,
        Field(discriminator="kind"),
    ] = ConfidenceConfusion()
    """How much each token counts."""
    loss: Annotated[
        SampledReverseKL
        | SampledSquare
        | SupportDivergence
        | SupportPolicyGradient
        | EntropyAware
        | VocabularyDivergence
        | MiniLLM,
        Field(discriminator="kind"),
    ] = SampledReverseKL()
    """Per-token loss."""
    aggregate: Literal["seq", "token"] = "seq"
    """Each kept trajectory counts once (`seq`), or each kept token (`token`)."""

    @property
    def readers(self) -> tuple[Any, ...]:
        """The stages that read the scores."""
        return self.filter, self.reweight, self.loss

    @property
    def needs(self) -> frozenset[str]:
        """What the score must give them."""
        return frozenset().union(*(stage.needs for stage in self.readers))
