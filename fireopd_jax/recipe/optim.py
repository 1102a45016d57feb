"""The optimizer of a stage, and supervised training before distillation."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.models.decoder import Remat


@config
class OptimConfig:
    """AdamW, its schedule, and how a batch is cut."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Updates of linear rise from 0."""
    final_fraction: UnitInterval = 0.1
    """Learning rate at the end over its peak; has no meaning for `constant`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """AdamW's decoupled weight decay, on every parameter."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; null is no clipping."""
    master: bool = True
    """Parameters in bfloat16 have a float32 copy that learns; without, small steps are lost."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of AdamW's first moment; the second is float32, bfloat16 could not follow its decay."""
    micro_batch_size: PositiveInt | None = None
    """Rows of one forward and backward pass: a matter of memory only; by default all."""
    remat: Remat = "none"
    """What the backward pass computes again: nothing, a layer (`full`), or all but its products."""


@config
class SftConfig:
    """Supervised training before distillation."""

    steps: PositiveInt = 100
    """Optimizer updates, at most."""
    stop_loss: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Ends the stage early, once the loss averaged over ten steps is this low, in nats a token."""
    batch_size: PositiveInt = 64
    """Rows a step."""
    source: Literal["rows", "teacher"] = "rows"
    """Whose responses are imitated: the rows' references, or responses drawn from the teachers."""
    teacher_rows: PositiveInt = 4096
    """For `source: teacher`: how many rows the teachers answer."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4)
    """Optimizer of this stage."""
