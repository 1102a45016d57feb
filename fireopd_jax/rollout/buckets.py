"""Prompts by length: each bucket is sampled by an engine of its own width.

    lengths -> [(width, indices)], the shortest first

An engine's work for a prompt depends on its width, so that one long prompt would make every short
one as slow. Responses do not depend on buckets: they depend on seed, sample id and position.
"""

from collections.abc import Sequence

ALIGN = 16
"""Widths are multiples of this, so that fewer programs are compiled."""
RATIO = 4
"""Largest ratio of two lengths in a bucket; each bucket compiles once more."""
SHORT = 256
"""Longest prompt of a bucket that is not divided any more: there is nothing to gain."""


def width_for(longest: int) -> int:
    """Return the width of an engine for prompts of up to `longest` tokens."""
    return -(-longest // ALIGN) * ALIGN


def by_length(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return width and indices of each bucket of similar lengths, in the order of the lengths."""
    waiting = sorted(range(len(lengths)), key=lambda index: lengths[index])
    buckets: list[tuple[int, list[int]]] = []
    while waiting:
        longest = lengths[waiting[-1]]
        least = 0 if longest <= SHORT else longest / RATIO
        own = [index for index in waiting if lengths[index] >= least]
        waiting = waiting[: len(waiting) - len(own)]
        buckets.append((width_for(longest), sorted(own)))
    return buckets[::-1]
