"""A method as its choices: who scores, what is kept, how tokens are weighed, the loss.

score -> filter, reweight, loss; what these need the score must give
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.filtering import AllOf, Filters, TeacherQuantile
from fireopd_jax.losses.sampled_token import SampledReverseKL, SampledSquare
from fireopd_jax.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.reweighting import ConfidenceConfusion, Progressive, SoftTrajectories, Uniform
from fireopd_jax.rollout.settings import RolloutConfig
from fireopd_jax.scoring import SampledToken, TopK, WholeVocabulary


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


def conflicts(method: MethodConfig, rollout: RolloutConfig, num_teachers: int) -> Iterator[str]:
    """Refuse stages that this score or these rollouts make wrong, vain, or identically zero."""
    score, loss = method.score, method.loss
    filtered = rollout.top_p < 1 or max(rollout.top_k, rollout.min_p, rollout.min_tokens) > 0
    sampled = isinstance(loss, SampledReverseKL | SampledSquare)
    if filtered and sampled and loss.importance_cap is None:
        yield (
            f"{loss.kind} is exact only for unfiltered rollouts: with rollout.top_p, "
            "top_k, min_p or min_tokens set, give method.loss.importance_cap too"
        )
    few = loss if isinstance(loss, SupportDivergence) else None
    tail = few is not None and few.head == "tail_sample"
    if filtered and (tail or isinstance(loss, EntropyAware | MiniLLM)):
        yield (
            f"{loss.kind} takes the rollout's tokens for draws of the student itself: expected "
            "rollout.top_p=1, top_k=0, min_p=0 and min_tokens=0"
        )
    own = sampled or tail or isinstance(loss, EntropyAware | MiniLLM)
    if rollout.on_policy_fraction < 1 and own:
        yield (
            f"rollout.on_policy_fraction={rollout.on_policy_fraction}: {loss.kind} takes every "
            "response for the student's own; expected 1, or a divergence on a support or over the "
            "vocabulary"
        )
    filters = method.filter.filters if isinstance(method.filter, AllOf) else (method.filter,)
    if sum(isinstance(each, TeacherQuantile) and each.window > 0 for each in filters) > 1:
        yield (
            "method.filter.filters: two rank by earlier batches (window), of which one memory is "
            "kept; expected one"
        )
    if score.margin is not None and rollout.group_size == 1:
        yield (
            "method.score.margin compares the responses of a prompt: expected rollout.group_size "
            "of 2 or more, it is 1"
        )
    if score.margin is not None and not method.needs & {"margin"}:
        yield (
            "method.score.margin: neither filter nor loss reads it; expected null, or "
            "method.loss.margin=true"
        )
    if few is not None and tail and few.divergence.kind != "reverse_kl":
        yield (
            f"method.loss.divergence={few.divergence.kind}: head=tail_sample estimates the "
            "reverse KL only; expected reverse_kl, or head=tail_bucket"
        )
    lone = False
    if isinstance(score, TopK):
        lone = score.k == 1 and score.support != "union" and not score.sampled
    if lone and few is not None and few.head == "renormalised":
        yield (
            "method.score.k=1: one word renormalised has probability 1 in both models, the loss is "
            "identically zero; expected k of 2 or more, or score.sampled=true"
        )
    if isinstance(score, WholeVocabulary) and not method.needs & {"teacher.hidden", "reverse_kl"}:
        yield (
            "method.score: whole_vocabulary keeps the teacher's hidden states, which neither "
            "filter, reweight nor loss reads; expected sampled_token or top_k"
        )
    if isinstance(score, WholeVocabulary) and num_teachers > 1:
        yield (
            f"method.score: whole_vocabulary reads one teacher's head, {num_teachers} "
            "teachers are given; expected one, or score.kind=top_k"
        )
