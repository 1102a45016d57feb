"""Micro-batches and rematerialisation that fit the memory of a device.

shapes of a pass -> estimated bytes of each choice -> the cheapest choice that fits

Estimates are a first guess: `training.plan` compiles the chosen program and compares.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.decoder import Remat
from fireopd_jax.models.packing import PassShape
from fireopd_jax.recipe.optim import OptimConfig

ENOUGH_TOKENS = {"cpu": 640, "gpu": 8192, "tpu": 8192}
"""Tokens per device with which a pass keeps the device busy: smaller passes cost time, as much as
recomputing activations does; larger ones leave more of the last pass empty."""
REMATS: dict[str, tuple[Remat, ...]] = {
    "cpu": ("dots", "full"),
    "gpu": ("none", "dots", "full"),
    "tpu": ("none", "dots", "full"),
}
"""What the backward pass recomputes, the fastest first. On a CPU writing and reading all that a
scan keeps takes longer than computing it again: `dots` takes .74 to .96 of the time of `none`."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a batch passes through a model."""

    micro_batch_size: int | None = None
    """Padded rows per pass; None: all, or packed."""
    remat: Remat = "none"
    micro_batch_tokens: int | None = None
    """Tokens of packed rows per pass and device; None: rows are padded."""

    def applied(self, optim: OptimConfig) -> OptimConfig:
        """Return the settings of an optimizer with this choice."""
        return dataclasses.replace(optim, **dataclasses.asdict(self))

    def __str__(self) -> str:
        """Return the setting that is not the default, as its key and value."""
        if self.micro_batch_tokens is not None:
            return f"micro_batch_tokens={self.micro_batch_tokens}"
        return f"micro_batch_size={self.micro_batch_size}"


@dataclasses.dataclass(frozen=True)
class Pass:
    """A batch and the model that it passes through."""

    model: DecoderConfig
    rows: int
    tokens: int
    """Width of a row: of prompt and response."""
    devices: int = 1
    platform: str = "cpu"
    tensor: int = 1
    """Devices that share a layer, each for the rows of all (`models.shares`)."""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation; XLA on a CPU computes in float32."""
        return 4 if self.platform == "cpu" else jnp.dtype(self.model.dtype).itemsize

    def shape(self, tokens: int) -> PassShape:
        """Return the packs of a pass of about `tokens` tokens."""
        return PassShape.of(self.tokens, tokens, -(-self.rows // self.devices))

    def per_device(self, choice: Choice) -> int:
        """Return the tokens of one pass on one device."""
        if choice.micro_batch_tokens is not None:
            return self.shape(choice.micro_batch_tokens).tokens
        rows = choice.micro_batch_size or self.rows
        return -(-rows // self.devices) * self.tokens

    def gathered(self, tokens: int) -> int:
        """Return the bytes of a block's inputs and outputs for the rows of other devices."""
        return 2 * (self.tensor - 1) * tokens * self.model.hidden_size * self.itemsize

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
        layer = tokens * size * (14 * width + 8 * inner)
        carried = tokens * width * size
        attended = c.num_attention_heads * c.head_dim
        products = tokens * (heads + attended + width + 2 * inner) * size
        saved = {"none": layer, "dots": carried + products, "full": carried}[choice.remat]
        working = (0 if choice.remat == "none" else layer) + self.gathered(tokens)
        whole = choice.micro_batch_tokens is None and choice.micro_batch_size in (None, self.rows)
        gradients = trained * 4 * (1 if whole else 2)
        # The optimizer's step is not written before it is known to be finite.
        optimizer = trained * 4 * 4
        return max(c.num_hidden_layers * saved + working + gradients, optimizer)

    def score(self, choice: Choice) -> int:
        """Return the bytes that a forward pass takes besides the parameters."""
        tokens, c = self.per_device(choice), self.model
        own = tokens * self.itemsize * (6 * c.hidden_size + 2 * c.intermediate_size)
        return own + self.gathered(tokens)


def token_sizes(of: Pass) -> list[int]:
    """Return the tokens of a pass to choose from: those that keep the device busy, then halves.

    The least is the longest row.
    """
    sizes = [of.shape(ENOUGH_TOKENS[of.platform]).tokens]
    while (smaller := of.shape(sizes[-1] // 2).tokens) < sizes[-1]:
        sizes.append(smaller)
    return sizes


def update_choices(of: Pass, optim: OptimConfig) -> list[Choice]:
    """Return the choices for an update, the cheapest in time first; what is set stays.

    A pass that keeps the device busy and recomputes comes before smaller passes.
    """
    remats = REMATS[of.platform] if optim.remat is None else (optim.remat,)
    if optim.micro_batch_size is not None:
        return [Choice(optim.micro_batch_size, remat) for remat in remats]
    given = optim.micro_batch_tokens
    largest, *smaller = token_sizes(of) if given is None else [given]
    found = [Choice(None, remat, largest) for remat in remats]
    return found + [Choice(None, remats[-1], size) for size in smaller]


def score_choices(
    of: Pass, micro_batch_size: int | None, micro_batch_tokens: int | None = None
) -> list[Choice]:
    """Return the choices for scoring, the cheapest in time first; what is set stays."""
    if micro_batch_size is not None:
        return [Choice(micro_batch_size)]
    sizes = token_sizes(of) if micro_batch_tokens is None else [micro_batch_tokens]
    return [Choice(micro_batch_tokens=size) for size in sizes]


def first_that_fits(
    choices: Sequence[Choice], needs: Callable[[Choice], float | int], room: float | int
) -> Choice:
    """Return the first choice that needs at most `room` bytes, else the one that needs least."""
    for choice in choices:
        if needs(choice) <= room:
            return choice
    return min(choices, key=needs)
