"""Filters against known failures: repetition, low-advantage tails, foreign tokens, wide margins.

scores, context -> keep bool[B], or bool[B, T]
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Bool, Float32
from pydantic import Field, PositiveFloat, PositiveInt

from fireopd_jax.config import config
from fireopd_jax.method.stage import Keep, StatelessFilter
from fireopd_jax.ops.ranks import median_by_id, repetition_rate
from fireopd_jax.types import Array, Scores, StageContext


@config
class RepetitionGuard(StatelessFilter):
    """Drop repetitive trajectories, to which teachers assign high likelihood.

    The repetition rate is the fraction of a response's n-grams that occurred earlier in it.
    """

    kind: Literal["repetition_guard"] = "repetition_guard"
    """Name of this filter."""
    ngram: PositiveInt = 8
    """Length n of the n-grams, in tokens."""
    limit: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Largest repetition rate of a trajectory that is kept."""

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, " B"]:
        """Return the rows that are kept."""
        return jnp.any(context.mask, axis=1) & (self.rates(context) <= self.limit)

    def rates(self, context: StageContext) -> Float32[Array, " B"]:
        """Return the repetition rate of each row."""
        if context.tokens is None:
            raise ValueError("repetition_guard needs the response tokens: StageContext.tokens")
        return repetition_rate(context.tokens, context.mask, self.ngram)

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        """Return the repetition rates and their limit."""
        rate = self.rates(context)
        return rate, jnp.full_like(rate, self.limit)


@config
class Prefix(StatelessFilter):
    """Keep the prefix of each trajectory up to where its recent mean advantage falls too low.

    It is cut before the first token at which the mean of A = log pi_T - log pi_S over the last
    `window` tokens (fewer at the start) falls below `least`.
    """

    kind: Literal["prefix"] = "prefix"
    """Name of this filter."""
    window: PositiveInt = 32
    """Tokens that the mean is taken over."""
    least: Annotated[float, Field(allow_inf_nan=False)] = -2.0
    """Mean advantage, in nats, below which a trajectory is cut."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, "B T"]:
        """Return the tokens that are kept."""
        mask = jnp.asarray(context.mask)
        advantage = jnp.where(mask, scores.advantage, 0.0)
        width = advantage.shape[1]
        total = jnp.pad(jnp.cumsum(advantage, axis=1), ((0, 0), (1, 0)))
        end = jnp.arange(1, width + 1)
        start = jnp.maximum(end - self.window, 0)
        mean = (total[:, end] - total[:, start]) / (end - start)[None]
        lost = jnp.cumsum(mask & ~(mean >= self.least), axis=1) > 0
        return mask & ~lost


@config
class SpecialTokens(StatelessFilter):
    """Mask token ids to which one of the models assigns almost no probability, as in a template.

    They are named by `strings`, or detected: ids with at least `least` occurrences in the batch and
    a median of |log pi_T - log pi_S| above `log_ratio`. Stop tokens are kept unless `stop` is set:
    without them nothing trains the student to end its responses.

    References: arXiv 2603.25562, which masks the first `<`, `think` and `<|im_end|>` of a response.
    """

    kind: Literal["special_tokens"] = "special_tokens"
    """Name of this filter."""
    strings: tuple[str, ...] = ()
    """Texts; every token that the student's tokenizer splits one of them into is masked."""
    log_ratio: PositiveFloat | None = 10.0
    """Bound on the median, in nats; null masks only the named tokens."""
    least: PositiveInt = 8
    """Fewest occurrences in the batch for a token id to be detected."""
    stop: bool = False
    """Mask stop tokens, too, where they are named or detected."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts whose token ids are masked."""
        return self.strings

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, "B T"]:
        """Return the tokens that are kept."""
        if context.tokens is None or context.special is None or context.stop is None:
            raise ValueError("special_tokens needs StageContext.tokens, special and stop")
        tokens, mask = jnp.asarray(context.tokens), jnp.asarray(context.mask)

        def among(ids: tuple[int, ...]) -> Array:
            known = jnp.asarray(ids or (-1,), jnp.int32)[None, None]
            return (tokens[..., None] == known).any(axis=-1)

        out = among(context.special)
        if self.log_ratio is not None:
            gap = jnp.abs(scores.advantage)
            flat = (tokens.reshape(-1), gap.reshape(-1), mask.reshape(-1))
            median, count = (x.reshape(mask.shape) for x in median_by_id(*flat))
            out |= (median > self.log_ratio) & (count >= self.least)
        return mask & ~(out if self.stop else out & ~among(context.stop))


@config
class GapBound(StatelessFilter):
    """Drop groups whose right and wrong responses differ too much in mean advantage.

    References: arXiv 2605.03677 (Uni-OPD), which drops groups with a gap above 10.
    """

    kind: Literal["gap_bound"] = "gap_bound"
    """Name of this filter."""
    largest: PositiveFloat = 10.0
    """Largest |mean s+ - mean s-| of a group that is kept, s the mean advantage of a response."""

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})

    def keep(self, scores: Scores, context: StageContext) -> Bool[Array, " B"]:
        """Return the rows that are kept."""
        return jnp.any(context.mask, axis=1) & (self.gaps(scores) <= self.largest)

    def gaps(self, scores: Scores) -> Float32[Array, " B"]:
        """Return |mean s+ - mean s-| of each row's group."""
        if scores.margin is None:
            raise ValueError("gap_bound needs graded responses: method.score.margin")
        return jnp.abs(jnp.asarray(scores.margin.gap))

    def measured(
        self, scores: Scores, context: StageContext, keep: Keep
    ) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
        """Return the gaps and their limit."""
        gap = self.gaps(scores)
        return gap, jnp.full_like(gap, self.largest)
