"""Sampling of responses in training: the section `rollout` of a configuration."""

from typing import Annotated

from pydantic import Field, PositiveInt

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_dense_gpu import DenseGPU
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from fireopd_jax.rollout.layouts import AUTO, Auto


@config
class RolloutConfig:
    """Sampling of responses in training."""

    batch_size: Annotated[int, Field(gt=0, le=2**24)] = 64
    """Responses per step."""
    group_size: PositiveInt = 1
    """Responses per prompt; must divide the batch size."""
    max_tokens: Annotated[int, Field(gt=0, le=2**24)] = 512
    """Maximum response length in tokens, the end-of-sequence token included."""
    window: PositiveInt = 1
    """Number of batches that are sampled, and refined, with the same parameters before the first
    update on any of them: 1 is on-policy, `run.steps` is offline."""
    overprovision: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Rows in flight beyond the batch, as a fraction of it: a step learns as soon as all but these
    have ended, and they go on in the next step with its parameters. 0 waits for every row."""
    on_policy_fraction: UnitInterval = 1.0
    """Probability that a row is trained on the student's own response; other rows are trained on
    their references. Only for losses that do not assume on-policy responses."""
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Sampling temperature, at which responses are also scored; 0 is greedy."""
    top_p: UnitInterval = 1.0
    """Sample from the smallest set of tokens with at least this probability mass; 1 is off."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Sample from this many most likely tokens; 0 is off."""
    min_p: UnitInterval = 0.0
    """Smallest probability relative to the most likely token's; 0 is off."""
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Minimum response length: the first so many tokens are no stop tokens."""
    slots: PositiveInt | None = None
    """Slots per replica: responses decoded at the same time; does not change responses. By default
    32 on a CPU, 256 on other devices."""
    cache: Annotated[
        Auto | Dense | DenseGPU | Paged | PagedTPU | PagedGPU, Field(discriminator="kind")
    ] = AUTO
    """Layout of the KV cache; `auto` is `paged_tpu` on a TPU and `dense` elsewhere."""
