"""Micro-batches and rematerialisation that fit the memory of a device.

shapes of a pass -> estimated bytes of each choice -> the cheapest choice that fits

Estimates are a first guess: `training.plan` compiles the chosen program and compares.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.decoder import Remat
from fireopd_jax.recipe.optim import OptimConfig

ENOUGH_TOKENS = 4096
"""Tokens per device with which a pass keeps the device busy: smaller micro-batches cost time, as
much as recomputing activations does."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a batch passes through a model."""

    micro_batch_size: int | None = None
    """Rows per pass; None: all."""
    remat: Remat = "none"

    def applied(self, optim: OptimConfig) -> OptimConfig:
        """Return the settings of an optimizer with this choice."""
        return dataclasses.replace(optim, micro_batch_size=self.micro_batch_size, remat=self.remat)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A batch and the model that it passes through."""

    model: DecoderConfig
    rows: int
    tokens: int
    """Width of a row: of prompt and response."""
    devices: int = 1
    cpu: bool = True
    """Whether bfloat16 activations are float32, as XLA has them on a CPU."""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 4 if self.cpu else jnp.dtype(self.model.dtype).itemsize

    def per_device(self, choice: Choice) -> int:
        """Return the tokens of one pass on one device."""
        rows = choice.micro_batch_size or self.rows
        return -(-rows // self.devices) * self.tokens

    def update(self, choice: Choice, trained: int) -> int:
        """Return the bytes that one update takes besides parameters and optimizer state.

        `trained` is the number of trained parameters: gradients, of several micro-batches twice.
        """
        tokens, c = self.per_device(choice), self.model
        width, size = c.hidden_size, self.itemsize
        inner = c.intermediate_size
        if c.moe is not None:
            inner = c.moe.moe_intermediate_size * c.moe.num_experts_per_tok
        heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        # Measured with SmolLM2-135M (docs/memory.md): one layer, its input, its matrix products.
        layer = tokens * (size * (14 * width + 8 * inner) + 7 * c.num_attention_heads * self.tokens)
        carried = tokens * width * size
        products = tokens * (heads + width + 3 * inner) * size
        saved = {"none": layer, "dots": carried + products, "full": carried}[choice.remat]
        working = 0 if choice.remat == "none" else layer
        gradients = trained * 4 * (1 if choice.micro_batch_size in (None, self.rows) else 2)
        return c.num_hidden_layers * saved + working + gradients

    def score(self, choice: Choice) -> int:
        """Return the bytes that a forward pass takes besides the parameters."""
        tokens, c = self.per_device(choice), self.model
        linear = self.itemsize * (4 * c.hidden_size + 2 * c.intermediate_size)
        return tokens * (linear + 5 * c.num_attention_heads * self.tokens)


def micro_batch_sizes(rows: int, devices: int) -> Iterator[int | None]:
    """Yield the sizes of micro-batches, the largest first: None (all rows), then the divisors."""
    yield None
    for size in range(rows - 1, 0, -1):
        if rows % size == 0 and size % devices == 0:
            yield size


def update_choices(of: Pass, optim: OptimConfig) -> list[Choice]:
    """Return the choices for an update, the cheapest in time first; what is set stays.

    Micro-batches that keep the device busy come before recomputation, and that before smaller
    ones.
    """
    given = optim.micro_batch_size
    sizes = [given] if given is not None else list(micro_batch_sizes(of.rows, of.devices))
    remats: tuple[Remat, ...] = ("none", "dots", "full") if optim.remat is None else (optim.remat,)
    large = [
        size
        for size in sizes
        if size in (None, given) or of.per_device(Choice(size)) >= ENOUGH_TOKENS
    ]
    found = [Choice(size, remat) for remat in remats for size in large]
    found += [Choice(size, remats[-1]) for size in sizes if size not in large]
    return found


def score_choices(of: Pass, given: int | None) -> list[Choice]:
    """Return the choices for scoring, the cheapest in time first."""
    sizes = [given] if given is not None else list(micro_batch_sizes(of.rows, of.devices))
    return [Choice(size) for size in sizes]


def first_that_fits(
    choices: Sequence[Choice], needs: Callable[[Choice], float | int], room: float | int
) -> Choice:
    """Return the first choice that needs at most `room` bytes, else the one that needs least."""
    for choice in choices:
        if needs(choice) <= room:
            return choice
    return min(choices, key=needs)
