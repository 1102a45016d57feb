"""The trajectories of a step as a Parquet file: prompt, response, scores and weights.

Batch, keep -> completions/step_000050.parquet, one row per trajectory
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation.graders import verdict
from fireopd_jax.method.stage import Keep
from fireopd_jax.runtime.processes import fetched, leads
from fireopd_jax.runtime.warnings import warn_once
from fireopd_jax.types import Batch, Rewritten, Writer


def write_completions(
    file: Path,
    batch: Batch,
    keep: Keep,
    *,
    rows: Sequence[Row],
    teachers: Sequence[str],
    decode: Callable[[list[int]], str],
    grader: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Write every trajectory of a batch to a Parquet file; lists have one entry per token.

    `rows` are those of the data set, `teachers` the names by route, `decode` maps token ids to
    text, `grader` a row index to its kind of grader. Rows without a token are left out, but for
    rewrites that were dropped; without any row no file is written. Returns the
    rows.
    """
    batch, keep = fetched((batch, keep))
    rollout, scores = batch.rollout, batch.scores
    table: list[dict[str, Any]] = []
    original = rollout.original
    shown = rollout.mask if original is None else rollout.mask | original.rewrite
    for i in np.flatnonzero(shown.any(axis=1)):
        row, real = int(rollout.prompts.row[i]), rollout.mask[i]
        source = rows[row]
        response = decode(rollout.tokens[i][shown[i]].tolist())
        answer = source.answer
        found = None if answer is None else verdict(source.begun + response, answer, grader(row))
        line = {
            "row": row,
            "prompt": source.prompt[-1]["content"],
            "response": response,
            "answer": answer,
            "correct": found and found.correct,
            "rule": found and found.rule,
            "plain": found and found.plain,
            "finished": bool(rollout.finished[i]),
            "teacher": teachers[int(rollout.prompts.teacher[i])],
            "writer": Writer(int(rollout.writer[i][shown[i]][0])).name.lower(),
            "kept": bool(np.any(keep[i])),
            "tokens": rollout.tokens[i][real].tolist(),
            "student_logprob": scores.student.logprob[i][real].tolist(),
            "weight": batch.weight[i][real].tolist(),
        }
        if original is not None:
            attempt = original.tokens[i][original.mask[i]].tolist()
            line |= {
                "original": decode(attempt),
                "refined": Rewritten(int(original.outcome[i])).name.lower(),
            }
        if (audit := rollout.audit) is not None:
            heard = audit.samples[i] > 0
            line |= {
                "audited_at": audit.anchor[i][heard].tolist(),
                "agreement": (audit.agreement[i][heard] / audit.samples[i][heard]).tolist(),
            }
        if rollout.leaked is not None:
            line["leaked"] = bool(rollout.leaked[i])
        if scores.teacher is not None:
            logprob = scores.teacher.logprob[i][real]
            line |= {
                "teacher_score": float(logprob.mean()) if len(logprob) else None,
                "teacher_logprob": logprob.tolist(),
            }
        table.append(line)
    if table and leads():
        beside = file.with_suffix(".part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), beside)
            beside.rename(file)
        except (OSError, pyarrow.ArrowException, UnicodeError) as error:
            # A report is not worth the run, which stops where it cannot save.
            warn_once(
                f"{file.parent}: responses cannot be written ({' '.join(str(error).split())})"
            )
    return table
