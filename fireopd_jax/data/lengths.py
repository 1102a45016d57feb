"""Rows by the length of their prompts in tokens: those too long or too short are not kept.

lengths -> not_too_long -> not_too_short -> indices of the rows that are kept
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from fireopd_jax.config import UserError
from fireopd_jax.data.rows import Row
from fireopd_jax.data.settings import DataConfig

BLOCK = 16
"""Limits that errors suggest are multiples of this."""


def not_too_long(
    rows: Sequence[Row], longest: Integer[np.ndarray, " N"], config: DataConfig
) -> Integer[np.ndarray, " M"]:
    """Return the indices of the rows whose prompts fit; raise as `config.overlong` asks."""
    limit = config.max_prompt_tokens
    over = np.flatnonzero(longest > limit)
    if len(over) and config.overlong == "error":
        raise UserError(
            f"{rows[over[0]].origin}: the prompt has {longest[over[0]]} tokens, over "
            f"data.max_prompt_tokens={limit}; raise it, or set data.overlong=drop"
        )
    if len(over) == len(rows):
        raise UserError(
            f"data.max_prompt_tokens={limit}: none of {len(rows)} prompts fits{_that_fits(longest)}"
        )
    return np.flatnonzero(longest <= limit)


def _that_fits(longest: Integer[np.ndarray, " N"]) -> str:
    """Return the lengths of the prompts, and the limit that all but the longest hundredth meet."""
    if not len(longest):
        return ""
    most = int(np.quantile(longest, 0.99, method="higher"))
    return (
        f", they have {longest.min()} to {longest.max()} tokens; expected "
        f"data.max_prompt_tokens={-(-most // BLOCK) * BLOCK}"
    )


def not_too_short(
    fits: Integer[np.ndarray, " M"], length: Integer[np.ndarray, " N"], config: DataConfig
) -> Integer[np.ndarray, " K"]:
    """Return those of the indices `fits` whose prompts have `min_prompt_tokens`.

    Raises `UserError` if no prompt has.
    """
    kept = fits[length[fits] >= config.min_prompt_tokens]
    if not len(kept):
        raise UserError(
            f"data.min_prompt_tokens={config.min_prompt_tokens}: none of {len(fits)} prompts is as "
            "long"
        )
    return kept
