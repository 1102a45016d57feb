"""Batches without content, of the shapes that a run has."""

import numpy as np

from fireopd_jax.data.pipeline import Encoded
from fireopd_jax.types import Prompts


def example_prompts(encoded: Encoded, rows: int, *, references: bool) -> Prompts:
    """Return a batch of prompts of the widths that a run has, all zero."""

    def ints(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    row = ints(rows)
    return Prompts(
        tokens=ints(rows, encoded.max_prompt_tokens),
        length=row,
        teacher_tokens=ints(rows, encoded.max_teacher_prompt_tokens),
        teacher_length=row,
        teacher=row,
        row=row,
        sample_id=row,
        group=row,
        reference=ints(rows, encoded.max_reference_tokens) if references else None,
        reference_length=row if references else None,
    )
