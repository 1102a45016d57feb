"""The margin between right and wrong responses to a prompt, from graded rollouts.

scores, groups, correct -> Margin(shift f32[B], gap f32[B])
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Int32
from pydantic import Field

from fireopd_jax.config import config
from fireopd_jax.types import Array, Margin, Rollout, Scores


@config
class OutcomeMargin:
    """Shift advantages so that right responses exceed wrong ones of the prompt by a margin.

    s_i is the mean over the tokens of A = log pi_T - log pi_S; d = max(0, delta - (mean s+ - mean
    s-)), the means over the right and the wrong responses to a prompt. d / 2 is added to the
    advantage of every token of a right response and subtracted from that of a wrong one.

    References: arXiv 2605.03677 (Uni-OPD), Eq. 23.
    """

    delta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.4
    """Margin, in nats per token."""

    def __call__(self, scores: Scores, rollout: Rollout) -> Scores:
        """Return the scores with `margin` set; rows without a token belong to no group.

        Raises ValueError where the responses are not graded.
        """
        if rollout.correct is None:
            raise ValueError("margin needs graded responses: Rollout.correct")
        correct = jnp.asarray(rollout.correct)
        mask = jnp.asarray(rollout.mask)
        advantage = jnp.where(mask, scores.advantage, 0.0)
        mean = advantage.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
        valid = mask.any(axis=1)
        shift, gap = self._margins(mean, jnp.asarray(rollout.prompts.group), correct > 0, valid)
        margin = Margin(jnp.where(valid, shift, 0.0), jnp.where(valid, gap, 0.0))
        return jax.lax.stop_gradient(dataclasses.replace(scores, margin=margin))

    def _margins(
        self, mean: Array, group: Int32[Array, " B"], right: Array, valid: Array
    ) -> tuple[Array, Array]:
        same = (group[:, None] == group[None]) & valid[None]

        def mean_of(chosen: Array) -> tuple[Array, Array]:
            inside = same & chosen[None]
            count = inside.sum(axis=1)
            return jnp.where(inside, mean[None], 0.0).sum(axis=1) / jnp.maximum(count, 1), count

        (above, rights), (below, wrongs) = mean_of(right), mean_of(~right)
        both = (rights > 0) & (wrongs > 0)
        gap = jnp.where(both, above - below, 0.0)
        push = jnp.where(both, jnp.maximum(0.0, self.delta - gap), 0.0) / 2
        return jnp.where(right, push, -push), gap
