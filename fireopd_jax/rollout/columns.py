"""The vocabulary's columns in blocks, whole on one device or split over a mesh axis.

    logits [B, V] -> blocks [B, N, block], N = ceil(V / block)

Under `shard_map` every device of the axis holds V / n columns, in order; what they tell one another
is a number a row, or a number a block and row, never the columns.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int32, Shaped

from fireopd_jax.types import Array, pytree

WIDE, NARROW = 128, 16
SMALL_VOCABULARY = 4096


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that this device holds, and how to ask the others about theirs."""

    width: int
    """Columns here."""
    axis: str | None = None
    """Mesh axis over which the vocabulary is split; None: all of it is here."""

    @property
    def shards(self) -> int:
        """Devices that share the vocabulary."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    @property
    def size(self) -> int:
        """The whole vocabulary."""
        return self.width * self.shards

    @property
    def block(self) -> int:
        """Columns of a block; of the whole vocabulary's making, so that sharding changes none."""
        return WIDE if self.size >= SMALL_VOCABULARY else NARROW

    @property
    def count(self) -> int:
        """Blocks here."""
        return -(-self.width // self.block)

    def check(self) -> None:
        """Refuse shards that would cut a block in two."""
        if self.shards > 1 and self.width % self.block:
            raise ValueError(
                f"a vocabulary of {self.size} in {self.shards} shards has {self.width} columns a "
                f"shard; expected a multiple of the block of {self.block}: pad it with -inf"
            )

    def split(self, logits: Float32[Array, "B W"]) -> Float32[Array, "B N block"]:
        """Lay the columns in blocks, the last one filled up with -inf."""
        if missing := self.count * self.block - self.width:
            padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
            # Fused into what reads the blocks, it would cost them their vector instructions.
            logits = lax.optimization_barrier(padded)
        return logits.reshape(len(logits), self.count, self.block)

    def first(self) -> Array | int:
        """Give the id of the first column here."""
        return 0 if self.axis is None else lax.axis_index(self.axis) * self.width

    def ids(self) -> Int32[Array, "1 N block"]:
        """Give every column's token id, in blocks."""
        ids = self.first() + jnp.arange(self.count * self.block, dtype=jnp.int32)
        return ids.reshape(1, self.count, self.block)

    def sum(self, value: Shaped[Array, "*S"]) -> Shaped[Array, "*S"]:
        """Add up over the shards."""
        return value if self.axis is None else lax.psum(value, self.axis)

    def max(self, value: Shaped[Array, "*S"]) -> Shaped[Array, "*S"]:
        """Take the largest over the shards.

        Of what all have worked out from the same numbers it is the value itself, and JAX then knows
        that they agree: branches on it are taken together.
        """
        return value if self.axis is None else lax.pmax(value, self.axis)

    def gather(self, value: Shaped[Array, "B L"]) -> Shaped[Array, "B G"]:
        """Join what the shards have along the second axis, in the order of the columns."""
        if self.axis is None:
            return value
        return lax.all_gather(value, self.axis, axis=1, tiled=True)

    def pick(
        self, blocks: Float32[Array, "B N block"], chosen: Int32[Array, " B"]
    ) -> tuple[Float32[Array, "B block"], Bool[Array, " B"]]:
        """Read one block a row; false where another shard holds it."""
        here = chosen if self.axis is None else chosen - lax.axis_index(self.axis) * self.count
        inside = (here >= 0) & (here < self.count)
        at = jnp.clip(here, 0, self.count - 1)[:, None, None]
        return jnp.take_along_axis(blocks, at, axis=1)[:, 0], inside


@pytree
class Weights:
    """Masses of the blocks, relative to each row's best token."""

    top: Float32[Array, " B"]
    """The largest logit of all."""
    best: Float32[Array, "B N"]
    """The largest logit of each block here."""
    mass: Float32[Array, "B N"]
    """Sum of exp(logit - top) over each block here."""
    total: Float32[Array, " B"]
    """The same over the whole vocabulary; not finite if any logit is NaN or +inf, or all -inf."""


def weigh(blocks: Float32[Array, "B N block"], columns: Columns) -> Weights:
    """Take each block's maximum and mass: all that a draw must know of the columns."""
    # Without the barriers the reduction of a reduction becomes one more pass over the columns.
    best = lax.optimization_barrier(blocks.max(axis=-1))
    top = columns.max(best.max(axis=-1))
    mass = lax.optimization_barrier(jnp.exp(blocks - top[:, None, None]).sum(axis=-1))
    return Weights(top, best, mass, columns.sum(mass.sum(axis=-1)))
