"""The order of the prompts: one shuffled, endless stream, or a mixture of several by weights.

    row indices, seed -> prompt_stream -> the n-th row, a function of (rows, weights, seed, n)

In a mixture every window of prompts holds the sources in proportion to their weights, whatever
their sizes; a source that ends begins anew, shuffled anew.
"""

from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Integer

from fireopd_jax.config import UserError


def prompt_stream(
    drawn: Sequence[int],
    seed: int,
    source: Integer[np.ndarray, " N"],
    weights: Sequence[float],
) -> grain.MapDataset:
    """Return the endless stream of the row indices `drawn`.

    `source` is the source of each row of the data, `weights` those of the sources; without weights
    all rows are one source. Raises `UserError` for a source without a row.
    """
    if not weights:
        return _shuffled(drawn, seed)
    streams = []
    for index in range(len(weights)):
        own = [row for row in drawn if source[row] == index]
        if not own:
            raise UserError(
                f"data.mixture[{index}]: none of its rows is left to train on; remove it, or see "
                "data.max_prompt_tokens, eval.problems and what the method needs of a row"
            )
        # A source's order must not follow another's of the same size.
        streams.append(_shuffled(own, (seed + index) % 2**32))
    return grain.MapDataset.mix(streams, weights=list(weights))


def _shuffled(drawn: Sequence[int], seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(drawn).seed(seed).shuffle().repeat()
