"""Samples of a step for people and notebooks: prompt, response, and what the method made of it.

Batch, keep -> completions/step_000050.parquet, a row a trajectory
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet

from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation.graders import grade
from fireopd_jax.types import Batch


def write_completions(
    file: Path,
    batch: Batch,
    keep: jax.Array,
    *,
    rows: Sequence[Row],
    teachers: Sequence[str],
    decode: Callable[[list[int]], str],
) -> None:
    """Write every trajectory of a batch; lists hold one number a response token.

    `rows` are the data set's, `teachers` the names by route, `decode` turns ids into text.
    """
    batch, keep = jax.device_get((batch, keep))
    rollout, scores = batch.rollout, batch.scores
    table = []
    for i in np.flatnonzero(rollout.mask.any(axis=1)):
        row, real = int(rollout.prompts.row[i]), rollout.mask[i]
        source = rows[row]
        response = decode(rollout.tokens[i][real].tolist())
        table.append(
            {
                "row": row,
                "prompt": source.prompt[-1]["content"],
                "response": response,
                "answer": source.answer,
                "correct": None if source.answer is None else grade(response, source.answer),
                "finished": bool(rollout.finished[i]),
                "teacher": teachers[int(rollout.prompts.teacher[i])],
                "kept": bool(np.any(keep[i])),
                "teacher_score": float(scores.teacher.logprob[i][real].mean()),
                "tokens": rollout.tokens[i][real].tolist(),
                "student_logprob": scores.student.logprob[i][real].tolist(),
                "teacher_logprob": scores.teacher.logprob[i][real].tolist(),
                "weight": batch.weight[i][real].tolist(),
            }
        )
    if table:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), beside)
        beside.rename(file)
