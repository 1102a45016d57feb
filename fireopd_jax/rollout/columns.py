"""The vocabulary axis of logits in blocks, on one device or sharded over a mesh axis.

    logits [B, V] -> blocks [B, N, block], N = ceil(V / block)

Inside `shard_map` each of the n devices of the axis has V / n columns, in order. Devices exchange
one number for each row, or for each row and block, never the columns.
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
    """The columns of this device, and reductions over those of all devices."""

    width: int
    """Columns on this device."""
    axis: str | None = None
    """Mesh axis over which the vocabulary is sharded; None: it is not."""

    @property
    def shards(self) -> int:
        """Number of devices that share the vocabulary."""
        return 1 if self.axis is None else lax.axis_size(self.axis)

    @property
    def size(self) -> int:
        """Columns on all devices."""
        return self.width * self.shards

    @property
    def block(self) -> int:
        """Columns of a block: a function of the whole vocabulary, so the same when sharded."""
        return WIDE if self.size >= SMALL_VOCABULARY else NARROW

    @property
    def count(self) -> int:
        """Blocks on this device."""
        return -(-self.width // self.block)

    def check(self) -> None:
        """Raise ValueError if shards do not consist of whole blocks."""
        if self.shards > 1 and self.width % self.block:
            raise ValueError(
                f"a vocabulary of {self.size} in {self.shards} shards has {self.width} columns a "
                f"shard; expected a multiple of the block of {self.block}: pad it with -inf"
            )

    def split(self, logits: Float32[Array, "B W"]) -> Float32[Array, "B N block"]:
        """Return the columns in blocks, the last one padded with -inf."""
        if missing := self.count * self.block - self.width:
            padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
            # Fused into the reductions over blocks, the padding would stop their vectorisation.
            logits = lax.optimization_barrier(padded)
        return logits.reshape(len(logits), self.count, self.block)

    def first(self) -> Array | int:
        """Return the token id of this device's first column."""
        return 0 if self.axis is None else lax.axis_index(self.axis) * self.width

    def ids(self) -> Int32[Array, "1 N block"]:
        """Return the token ids of this device's columns, in blocks."""
        ids = self.first() + jnp.arange(self.count * self.block, dtype=jnp.int32)
        return ids.reshape(1, self.count, self.block)

    def sum(self, value: Shaped[Array, "*S"]) -> Shaped[Array, "*S"]:
        """Return the sum over the shards."""
        return value if self.axis is None else lax.psum(value, self.axis)

    def max(self, value: Shaped[Array, "*S"]) -> Shaped[Array, "*S"]:
        """Return the maximum over the shards.

        If all shards have the same value, the result is that value, but now JAX's types state that
        the shards agree, which a branch on it requires.
        """
        return value if self.axis is None else lax.pmax(value, self.axis)

    def gather(self, value: Shaped[Array, "B L"]) -> Shaped[Array, "B G"]:
        """Return the shards' arrays concatenated on the second axis, in the order of columns."""
        if self.axis is None:
            return value
        return lax.all_gather(value, self.axis, axis=1, tiled=True)

    def pick(
        self, blocks: Float32[Array, "B N block"], chosen: Int32[Array, " B"]
    ) -> tuple[Float32[Array, "B block"], Bool[Array, " B"]]:
        """Return the chosen block of each row, and whether this shard has it."""
        here = chosen if self.axis is None else chosen - lax.axis_index(self.axis) * self.count
        inside = (here >= 0) & (here < self.count)
        at = jnp.clip(here, 0, self.count - 1)[:, None, None]
        return jnp.take_along_axis(blocks, at, axis=1)[:, 0], inside


@pytree
class BlockMass:
    """Probability mass of the blocks, unnormalised: relative to each row's largest logit."""

    top: Float32[Array, " B"]
    """Largest logit of the row, over all shards."""
    best: Float32[Array, "B N"]
    """Largest logit of each block on this device."""
    mass: Float32[Array, "B N"]
    """Sum of exp(logit - top) over each block on this device."""
    total: Float32[Array, " B"]
    """The same sum over the vocabulary; not finite if a logit is NaN or +inf, or all are -inf."""


def block_mass(blocks: Float32[Array, "B N block"], columns: Columns) -> BlockMass:
    """Return maximum and mass of each block: all that the first sampling stage needs."""
    # Without the barriers XLA fuses the nested reductions into another pass over the columns.
    best = lax.optimization_barrier(blocks.max(axis=-1))
    top = columns.max(best.max(axis=-1))
    mass = lax.optimization_barrier(jnp.exp(blocks - top[:, None, None]).sum(axis=-1))
    return BlockMass(top, best, mass, columns.sum(mass.sum(axis=-1)))
