"""How responses are drawn in training: the section `rollout` of a configuration."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_dense_gpu import DenseGPU
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU


@config
class RolloutConfig:
    """How responses are drawn in training."""

    batch_size: PositiveInt = 64
    """Responses a step."""
    group_size: PositiveInt = 1
    """Responses of each prompt; divides the batch size."""
    max_tokens: PositiveInt = 512
    """Longest response, its end-of-sequence token included."""
    on_policy_fraction: UnitInterval = 1.0
    """Share of the rows, each by lot, that learn from a response of the student's own; the others
    learn from their references. For losses that do not mind who wrote a response."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Divides the logits; models score at it too. 0 is greedy."""
    top_p: UnitInterval = 1.0
    """Smallest set of tokens with at least this mass."""
    top_k: NonNegativeInt = 0
    """Most likely tokens to draw from; 0 is off."""
    min_p: UnitInterval = 0.0
    """Least probability, relative to the most likely token's."""
    min_tokens: NonNegativeInt = 0
    """Tokens before a response may end: no stop token is drawn among the first so many."""
    slots: PositiveInt | None = None
    """Responses decoded at a time, on each device; changes no response. By default 32 on a CPU, 256
    elsewhere."""
    cache: Annotated[
        Dense | DenseGPU | Paged | PagedTPU | PagedGPU, Field(discriminator="kind")
    ] = Dense()
    """How keys and values are kept."""
