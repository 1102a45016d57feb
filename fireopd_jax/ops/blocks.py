"""Block sizes of the head implementations."""

import dataclasses

from fireopd_jax.runtime.target import platform

CPU_CHUNK_ELEMENTS = 2**21
"""Largest chunk on a CPU, in elements: 8 MiB of float32, small enough for caches and allocators."""
CHUNK_ELEMENTS = 2**27
"""Largest chunk elsewhere, in elements: 512 MiB of float32, so that the products are large and d
hidden is read and written few times.
"""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes in elements; None means the default of the implementation."""

    tokens: int | None = None
    vocabulary: int | None = None
    width: int | None = None


def default_chunk(tokens: int, width: int, larger: bool = False) -> int:
    """Return the number of vocabulary columns per chunk: 8192, 4096, 2048 or 1024.

    8192 is halved until neither the chunk's logits [N, C] nor its rows of d head [C, D] exceed the
    limit of the platform (the default backend of this process): `CPU_CHUNK_ELEMENTS` or
    `CHUNK_ELEMENTS`. `larger` doubles the limit where each chunk has a fixed cost: reading and
    writing d hidden in the backward pass, selecting in a top-K.
    """
    limit = CPU_CHUNK_ELEMENTS if platform() == "cpu" else CHUNK_ELEMENTS
    chunk, limit = 8192, limit * (2 if larger else 1)
    while chunk > 1024 and chunk * max(tokens, width) > limit:
        chunk //= 2
    return chunk
