"""Sizes of the blocks that a head implementation works on."""

import dataclasses

import jax

CPU_CHUNK_ELEMENTS = 2**21
"""Of a chunk on a CPU: 8 MiB of float32, which caches and allocators still treat kindly."""
CHUNK_ELEMENTS = 2**27
"""Elsewhere: 512 MiB, so that products are large and d hidden is rarely read and written."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes; where one is None the implementation's own formula chooses."""

    tokens: int | None = None
    vocabulary: int | None = None
    width: int | None = None


def default_chunk(tokens: int, width: int, larger: bool = False) -> int:
    """Give how many columns of logits exist at a time: 1024 to 8192.

    8192, halved until the chunk's logits [N, C] and its rows of d head [C, D] have no more elements
    than the platform likes; twice that where every chunk is larger in itself: in the backward pass
    it reads and writes d hidden, in a top-K it is chosen from. The platform is the default one of
    this process.
    """
    limit = CPU_CHUNK_ELEMENTS if jax.default_backend() == "cpu" else CHUNK_ELEMENTS
    chunk, limit = 8192, limit * (2 if larger else 1)
    while chunk > 1024 and chunk * max(tokens, width) > limit:
        chunk //= 2
    return chunk
