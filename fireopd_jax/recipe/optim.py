"""Configuration of the optimizer, and of supervised training before distillation."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from fireopd_jax.config import Section, UnitInterval, config
from fireopd_jax.models.decoder import Remat
from fireopd_jax.models.packing import one_measure


@config
class OptimConfig(Section):
    """The optimizer, its schedule, and micro-batches."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` (arXiv:2502.16982): orthogonalized momentum for the matrices of the layers
    and of adapters, AdamW for everything else."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """Peak learning rate."""
    adam_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Peak learning rate of what Muon does not update: embeddings, head, norms and biases; null:
    `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Updates of linear warm-up from 0."""
    final_fraction: UnitInterval = 0.1
    """Final learning rate as a fraction of its peak; no effect with `constant`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment; of Muon's momentum likewise."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay, on every parameter."""
    clip_norm: PositiveFloat | None = 1.0
    """Global norm that the gradient is clipped to; null is no clipping."""
    master: bool = True
    """Update a float32 copy of bfloat16 parameters; without it small updates are rounded away."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment; the second is float32: bfloat16 would round its decay away."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens per forward and backward pass on each device, of rows packed without padding, at least
    the longest row; changes memory, not the gradient. null: chosen for the device."""
    micro_batch_size: PositiveInt | None = None
    """Rows, each padded to the longest possible, per forward and backward pass, in place of
    `micro_batch_tokens`; null: rows are packed."""
    remat: Remat | None = None
    """What the backward pass recomputes: nothing (`none`), each layer (`full`), or all but matrix
    products and attention (`dots`). null: the fastest that fits the device."""

    def __post_init__(self) -> None:
        """Raise ValueError where passes are measured in tokens and in rows."""
        one_measure(self.micro_batch_tokens, self.micro_batch_size)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield `final_fraction` for a constant schedule, `adam_learning_rate` without Muon."""
        if self.schedule == "constant":
            yield "final_fraction", "with schedule: constant"
        if self.optimizer != "muon":
            yield "adam_learning_rate", "with optimizer: adamw"


Context = Literal["prompt", "teacher", "rewrite"]
"""Kinds of prompts in supervised training."""


@config
class SftConfig(Section):
    """Supervised training before distillation."""

    steps: PositiveInt = 100
    """Maximum number of optimizer updates."""
    stop_loss: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Stop early once the loss averaged over ten steps is at most this, in nats per token."""
    batch_size: PositiveInt = 64
    """Rows per step."""
    source: Literal["rows", "teacher"] = "rows"
    """Responses to train on: the rows' references, or responses sampled from the teachers."""
    contexts: tuple[Context, ...] = ("prompt",)
    """Prompts after which the responses are learned, equally often: the row's own (`prompt`), that
    of `method.teacher.prompt` (`teacher`), and that of `method.refine.prompt` (`rewrite`), which
    quotes the response with errors as the attempt."""
    teacher_rows: PositiveInt = 4096
    """For `source: teacher`: number of rows for which the teachers' responses are sampled."""
    save_every: PositiveInt = 500
    """Steps between checkpoints."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4)
    """Optimizer of this stage."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield `teacher_rows` where the source is not the teachers."""
        if self.source == "rows":
            yield "teacher_rows", "with source: rows"
