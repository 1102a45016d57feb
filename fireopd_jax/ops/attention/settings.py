"""What is static about a call of attention, and its block sizes."""

import dataclasses

from fireopd_jax.runtime.target import platform

CPU_BLOCK = 256
"""Queries and keys per block on a CPU: scores of one key head stay in the second-level cache."""
BLOCK = 512
"""Queries and keys per block elsewhere, so that the products are large."""
ALIGN = 8
"""Blocks are multiples of this."""


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """Tokens per block; None means the default of the implementation."""

    queries: int | None = None
    keys: int | None = None


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
    """Static options of `attention`; see there."""

    scale: float
    window: int | None = None
    """The window, if it is static."""
    by_index: bool = True
    """The window counts indices, not given positions."""
    local: bool = False
    """The operands are those of one device, not sharded by the compiler."""
    implementation: str | None = None
    blocks: AttentionBlocks = AttentionBlocks()
    interpret: bool = False


def default_blocks(length: int, blocks: AttentionBlocks) -> tuple[int, int]:
    """Return queries and keys per block for rows of `length` tokens.

    A default is reduced until the last block is nearly full: 1,100 tokens are 5 blocks of 224, not
    4 of 256 and one of 76.
    """
    largest = CPU_BLOCK if platform() == "cpu" else BLOCK

    def fitted(block: int | None) -> int:
        if block is not None:
            return min(block, _rounded_up(length, ALIGN))
        count = max(-(-length // largest), 1)
        return max(_rounded_up(-(-length // count), ALIGN), ALIGN)

    return fitted(blocks.queries), fitted(blocks.keys)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
