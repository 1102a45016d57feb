"""Sizes of the blocks that a head implementation works on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes; where one is None the implementation's own formula chooses."""

    tokens: int | None = None
    vocabulary: int | None = None
    width: int | None = None
