"""Rotary position embedding (RoPE): frequencies, their scaling for longer texts, the rotation.

    theta -> frequencies -> scaling -> angle of each position -> cos, sin -> rotated queries, keys

A scaling is a function of the frequencies alone, so a position has the same angle in every
sequence. Dynamic scaling, which depends on the length of the text, is not supported.
"""

import math
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fireopd_jax.config import config
from fireopd_jax.types import Array


@config
class LinearRope:
    """Linear scaling: all positions are divided by a factor."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat = 1.0
    """Ratio of the new to the original maximum length."""

    def __call__(self, frequency: Float32[Array, " F"], theta: float) -> tuple[Array, float]:
        """Return the scaled frequencies f / s, and the factor 1 of cos and sin."""
        return frequency / self.factor, 1.0


@config
class Llama3Rope:
    """Llama 3.1: long wavelengths are scaled, short ones are not, those between interpolated."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat = 8.0
    """Ratio of the new to the original maximum length."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths that fit into the original length fewer times than this are scaled fully."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths that fit into the original length more often than this are not scaled."""
    original_max_position_embeddings: PositiveInt = 8192
    """Maximum length before scaling, in tokens."""

    def __call__(self, frequency: Float32[Array, " F"], theta: float) -> tuple[Array, float]:
        """Return f (m + (1 - m) / s), m from 0 (long) to 1 (short waves), and the factor 1."""
        waves = self.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
        return frequency * (keep + (1 - keep) / self.factor), 1.0


@config
class YarnRope:
    """YaRN, arXiv 2309.00071: interpolation by a ramp over dimensions, and scaled attention."""

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat = 4.0
    """Ratio of the new to the original maximum length."""
    original_max_position_embeddings: PositiveInt = 32768
    """Maximum length before scaling, in tokens."""
    beta_fast: PositiveFloat = 32.0
    """The ramp begins at the wavelength that fits this often into the original length."""
    beta_slow: PositiveFloat = 1.0
    """The ramp ends at the wavelength that fits this often into the original length."""
    attention_factor: NonNegativeFloat | None = None
    """Factor of cos and sin, so of queries and keys; by default 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Round the ends of the ramp to whole dimensions."""

    def __call__(self, frequency: Float32[Array, " F"], theta: float) -> tuple[Array, float]:
        """Return f (m + (1 - m) / s), m the ramp from 1 to 0, and the factor of cos and sin."""
        half = len(frequency)

        def dimension(turns: float) -> float:
            share = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return half * math.log(share) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low if high != low else 0.001
        keep = 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / width, 0.0, 1.0)
        attention = self.attention_factor
        if attention is None:
            attention = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return frequency * (keep + (1 - keep) / self.factor), attention


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


def rotary(
    positions: Int32[Array, "B S"],
    head_dim: int,
    theta: float | None,
    scaling: LinearRope | Llama3Rope | YarnRope | None = None,
) -> tuple[Array, Array]:
    """Return cos and sin of each position's angles, f32[B, S, 1, head_dim / 2] each.

    Without a base all angles are 0, so that layers with and without RoPE are one program.
    """
    if theta is None:
        none = jnp.zeros((*positions.shape, 1, head_dim // 2), jnp.float32)
        return none + 1, none
    frequency = theta ** (-jnp.arange(head_dim // 2, dtype=jnp.float32) * 2 / head_dim)
    factor = 1.0
    if scaling is not None:
        frequency, factor = scaling(frequency, theta)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
    if factor == 1.0:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Float[Array, "B S N H"], rope: tuple[Array, Array]) -> Float[Array, "B S N H"]:
    """Return x with the pairs (i, i + H/2) of each head rotated by their angles, in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
