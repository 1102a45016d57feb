"""What is left out because it would teach the wrong thing: loops, lost ends, foreign tokens.

scores, rows -> keep bool[B], or bool[B, T]
"""

from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Bool
from pydantic import Field, PositiveFloat, PositiveInt

from fireopd_jax.config import config
from fireopd_jax.ops.ranks import median_by_id, repetition_rate
from fireopd_jax.types import Array, Rows, Scores


@config
class RepetitionGuard:
    """Drop trajectories that repeat themselves: a teacher finds loops likely.

    The rate is the share of a response's n-grams that stood in it before.
    """

    kind: Literal["repetition_guard"] = "repetition_guard"
    """Name of this filter."""
    ngram: PositiveInt = 8
    """Tokens of an n-gram."""
    limit: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Largest rate of a row that stays."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        if rows.tokens is None:
            raise ValueError("a repetition guard needs the rows' tokens")
        rate = repetition_rate(rows.tokens, rows.mask, self.ngram)
        return jnp.any(rows.mask, axis=1) & (rate <= self.limit)


@config
class Prefix:
    """Keep each trajectory up to where the teacher has lost it, instead of dropping it whole.

    It is cut before the first token at which the mean of A = log pi_T - log pi_S over the last
    `window` tokens, or those that there are, falls below `least`.
    """

    kind: Literal["prefix"] = "prefix"
    """Name of this filter."""
    window: PositiveInt = 32
    """Tokens of the mean."""
    least: Annotated[float, Field(allow_inf_nan=False)] = -2.0
    """Mean advantage, in nats, under which a trajectory is cut."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        mask = jnp.asarray(rows.mask)
        advantage = jnp.where(mask, scores.teacher.logprob - scores.student.logprob, 0.0)
        width = advantage.shape[1]
        total = jnp.pad(jnp.cumsum(advantage, axis=1), ((0, 0), (1, 0)))
        end = jnp.arange(1, width + 1)
        start = jnp.maximum(end - self.window, 0)
        mean = (total[:, end] - total[:, start]) / (end - start)[None]
        lost = jnp.cumsum(mask & ~(mean >= self.least), axis=1) > 0
        return mask & ~lost


@config
class SpecialTokens:
    """Leave out tokens that one of the models would never write: of a template, say.

    Named by `strings`, or found: those that stand `least` times in the batch with a median of
    |log pi_T - log pi_S| above `log_ratio`. A token that ends a response stays, unless `stop`: with
    it goes all that teaches the student to stop.

    References: arXiv 2603.25562, which masks the first `<`, `think` and `<|im_end|>` of a response.
    """

    kind: Literal["special_tokens"] = "special_tokens"
    """Name of this filter."""
    strings: tuple[str, ...] = ()
    """Texts of the student's tokenizer; every token that one of them is made of."""
    log_ratio: PositiveFloat | None = 10.0
    """Bound on the median, in nats; null: only those named."""
    least: PositiveInt = 8
    """Occurrences in the batch from which a median counts."""
    stop: bool = False
    """Leave the tokens out that end a response, too."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprob", "student.logprob"})

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, "B T"]:
        """Return the tokens that stay."""
        if rows.tokens is None or rows.special is None or rows.stop is None:
            raise ValueError("special tokens need the rows' tokens, and the ids of both kinds")
        tokens, mask = jnp.asarray(rows.tokens), jnp.asarray(rows.mask)

        def among(ids: tuple[int, ...]) -> Array:
            known = jnp.asarray(ids or (-1,), jnp.int32)[None, None]
            return (tokens[..., None] == known).any(axis=-1)

        out = among(rows.special)
        if self.log_ratio is not None:
            gap = jnp.abs(scores.teacher.logprob - scores.student.logprob)
            flat = (tokens.reshape(-1), gap.reshape(-1), mask.reshape(-1))
            median, count = (x.reshape(mask.shape) for x in median_by_id(*flat))
            out |= (median > self.log_ratio) & (count >= self.least)
        return mask & ~(out if self.stop else out & ~among(rows.stop))


@config
class GapBound:
    """Drop groups in which right and wrong responses are too far apart to be compared.

    References: arXiv 2605.03677 (Uni-OPD): groups with a gap above 10.
    """

    kind: Literal["gap_bound"] = "gap_bound"
    """Name of this filter."""
    largest: PositiveFloat = 10.0
    """Largest |mean s+ - mean s-| of a group that stays, s the mean advantage of a response."""

    needs: ClassVar[frozenset[str]] = frozenset({"margin"})

    def __call__(self, scores: Scores, rows: Rows) -> Bool[Array, " B"]:
        """Return the rows that stay."""
        if scores.margin is None:
            raise ValueError("a bound on the gap needs graded responses: method.score.margin")
        return jnp.any(rows.mask, axis=1) & (jnp.abs(scores.margin.gap) <= self.largest)
