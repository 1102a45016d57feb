"""The trajectories of a step as a Parquet file: texts, tokens, scores, weights, what was dropped.

Batch, keep, judged -> completions/step_000050.parquet, one row per trajectory
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation.graders import verdict
from fireopd_jax.method.stage import Judged, Keep
from fireopd_jax.runtime.processes import fetched, leads
from fireopd_jax.runtime.warnings import warn_once
from fireopd_jax.types import Array, Batch, Rewritten, Rollout, TopTokens, Writer

MOST_WORDS = 8
"""Token ids of a support that are written at each position, the teacher's likeliest first."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """How rows and tokens are read and graded."""

    rows: Sequence[Row]
    """Rows of the data set."""
    teachers: Sequence[str]
    """Names of the teachers, by route."""
    decode: Callable[[list[int]], str]
    """Token ids of a response -> its text."""
    pieces: Callable[[list[int]], list[str]]
    """Token ids -> the text of each."""
    grader: Callable[[int], str]
    """Index of a row -> its kind of grader."""


def on_host(batch: Batch) -> Batch:
    """Return what is written of a batch as NumPy arrays; a collective of all processes."""
    rollout = dataclasses.replace(batch.rollout, early=None)
    scores = dataclasses.replace(batch.scores, teacher_hidden=None, base_hidden=None)
    return fetched(dataclasses.replace(batch, rollout=rollout, scores=scores))


def write_completions(
    file: Path,
    batch: Batch,
    keep: Keep,
    texts: Texts,
    *,
    judged: Sequence[Judged] = (),
    measured: Mapping[str, Array] | None = None,
    top: TopTokens | None = None,
) -> list[dict[str, Any]]:
    """Write every trajectory of a batch, on the host, to a Parquet file; return its rows.

    Lists have one entry per response token, but for audited chunks. `judged` are the filters'
    judgements, `measured` other numbers of each row by column, `top` the most probable tokens where
    they were computed; else those of the support are written. Rows without a token are left out,
    but for rewrites that were dropped; without any row no file is written.
    """
    original = batch.rollout.original
    shown = np.asarray(
        batch.rollout.mask if original is None else batch.rollout.mask | original.rewrite
    )
    which = np.flatnonzero(shown.any(axis=1))
    reasons = _reasons(judged, keep, len(shown))
    numbers = {name: np.asarray(values) for name, values in (measured or {}).items()}
    lines = []
    for i in which:
        line = _texts_of(batch.rollout, int(i), shown[i], texts)
        line["kept"] = bool(np.any(keep[i]))
        line |= reasons[i] if batch.rollout.mask[i].any() else reasons[i] | {"dropped_by": "refine"}
        line |= {name: float(values[i]) for name, values in numbers.items()}
        lines.append(line | _chunks_of(batch.rollout, int(i)))
    if not lines:
        return lines
    table = pyarrow.Table.from_pylist(lines)
    for name, column in _of_tokens(batch, keep, which, texts, top).items():
        table = table.append_column(name, column)
    if leads():
        _write(file, table)
    return lines


def _write(file: Path, table: pyarrow.Table) -> None:
    beside = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, beside)
        beside.rename(file)
    except (OSError, pyarrow.ArrowException, UnicodeError) as error:
        # A report is not worth the run, which stops where it cannot save.
        warn_once(f"{file.parent}: responses cannot be written ({' '.join(str(error).split())})")


def _texts_of(rollout: Rollout, i: int, shown: np.ndarray, texts: Texts) -> dict[str, Any]:
    """Return prompt, response and grade of a row; of a rewritten one, the original, too."""
    row = int(rollout.prompts.row[i])
    source = texts.rows[row]
    response = texts.decode(rollout.tokens[i][shown].tolist())
    answer = source.answer
    found = None if answer is None else verdict(source.begun + response, answer, texts.grader(row))
    line = {
        "row": row,
        "prompt": _valid(source.prompt[-1]["content"]),
        "response": response,
        "answer": None if answer is None else _valid(answer),
        "correct": found and found.correct,
        "rule": found and found.rule,
        "plain": found and found.plain,
        "finished": bool(rollout.finished[i]),
        "teacher": texts.teachers[int(rollout.prompts.teacher[i])],
        "writer": Writer(int(rollout.writer[i][shown][0])).name.lower(),
    }
    if (original := rollout.original) is not None:
        line |= {
            "original": texts.decode(original.tokens[i][original.mask[i]].tolist()),
            "refined": Rewritten(int(original.outcome[i])).name.lower(),
        }
    return line


def _valid(text: str) -> str:
    """Return a text of the data without halves of characters, which no file can hold."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _chunks_of(rollout: Rollout, i: int) -> dict[str, Any]:
    """Return a row's audited chunks, and whether it speaks of privileged information."""
    line: dict[str, Any] = {}
    if (audit := rollout.audit) is not None:
        heard = audit.samples[i] > 0
        line = {
            "audited_at": audit.anchor[i][heard].tolist(),
            "audited_length": audit.length[i][heard].tolist(),
            "agreement": (audit.agreement[i][heard] / audit.samples[i][heard]).tolist(),
        }
    return line if rollout.leaked is None else line | {"leaked": bool(rollout.leaked[i])}


def _reasons(judged: Sequence[Judged], keep: Keep, rows: int) -> list[dict[str, Any]]:
    """Return, for each row, the filter that has dropped it, its score and its threshold.

    Of a row that is kept these are those of the last filter with a score.
    """
    judged = [_as_numpy(each) for each in judged]
    found = []
    for i in range(rows):
        scored = [each for each in judged if each.score is not None]
        last = scored[-1] if scored else None
        by = None
        if judged and not np.any(keep[i]):
            # A tie may fall otherwise here than in the compiled step: then it was the last one.
            by = next((each for each in judged if not np.any(each.keep[i])), judged[-1])
            last = by
        score, threshold = (
            None if values is None else float(values[i])
            for values in ((None, None) if last is None else (last.score, last.threshold))
        )
        found.append(
            {
                "dropped_by": None if by is None else by.kind,
                "filter_score": score,
                "filter_threshold": threshold,
            }
        )
    return found


def _as_numpy(judged: Judged) -> Judged:
    def plain(values: Array | None) -> np.ndarray | None:
        return None if values is None else np.asarray(values)

    keep = np.asarray(judged.keep)
    return Judged(judged.kind, keep, plain(judged.score), plain(judged.threshold))


def _of_tokens(
    batch: Batch, keep: Keep, which: np.ndarray, texts: Texts, top: TopTokens | None
) -> dict[str, pyarrow.Array]:
    """Return the columns with one entry per response token of the rows `which`."""
    rollout, scores = batch.rollout, batch.scores
    real = np.asarray(rollout.mask)[which]
    ends = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32)

    def each(values: Array) -> pyarrow.Array:
        return pyarrow.ListArray.from_arrays(ends, pyarrow.array(np.asarray(values)[which][real]))

    pieces = [texts.pieces(rollout.tokens[i][rollout.mask[i]].tolist()) for i in which]
    strings = pyarrow.array([piece for row in pieces for piece in row], pyarrow.string())
    columns = {
        "tokens": each(rollout.tokens),
        "token_text": pyarrow.ListArray.from_arrays(ends, strings),
        "student_logprob": each(scores.student.logprob),
        "student_entropy": each(scores.student.entropy),
        "weight": each(batch.weight),
        "coefficient": each(batch.coefficient),
    }
    if (rollout.writer[which] != rollout.writer[which][:, :1])[real].any():
        columns["token_writer"] = each(rollout.writer)
    if keep.ndim == 2:
        columns["token_kept"] = each(keep)
    if scores.teacher is not None:
        logprob = scores.teacher.logprob
        total = np.where(rollout.mask, logprob, 0).sum(axis=1)[which]
        length = real.sum(axis=1)
        mean = np.divide(total, length, out=np.full(len(which), np.nan), where=length > 0)
        columns["teacher_score"] = pyarrow.array(mean, from_pandas=True)
        columns["teacher_logprob"] = each(logprob)
        columns["teacher_entropy"] = each(scores.teacher.entropy)
    likely: dict[str, tuple[Any, Any]] = {}
    if top is not None:
        likely = {"student": (top.student_ids, top.student_logprob)}
        if top.teacher_ids is not None:
            likely["teacher"] = top.teacher_ids, top.teacher_logprob
    elif scores.support is not None:
        likely = {"teacher": (scores.support.ids, scores.support.teacher)}
    for who, pair in likely.items():
        ids, logprob = (np.asarray(values)[which] for values in pair)
        most = MOST_WORDS if top is None else ids.shape[-1]
        columns |= _words(who, ids, logprob, real, texts, most)
    return columns


def _words(
    who: str, ids: np.ndarray, logprob: np.ndarray, real: np.ndarray, texts: Texts, most: int
) -> dict[str, pyarrow.Array]:
    """Return a model's likeliest token ids at each token, likeliest first, and their texts."""
    order = np.argsort(np.where(ids >= 0, -logprob, np.inf), axis=-1, kind="stable")
    order = order[..., :most]
    ids = np.take_along_axis(ids, order, axis=-1)[real]
    logprob = np.take_along_axis(logprob, order, axis=-1)[real]
    there = ids >= 0
    distinct, index = np.unique(ids[there], return_inverse=True)
    names = pyarrow.array([texts.pieces([int(token)])[0] for token in distinct], pyarrow.string())
    inner = np.concatenate([[0], np.cumsum(there.sum(axis=-1))]).astype(np.int32)
    outer = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32)

    def nested(values: pyarrow.Array) -> pyarrow.Array:
        return pyarrow.ListArray.from_arrays(outer, pyarrow.ListArray.from_arrays(inner, values))

    return {
        f"{who}_top_ids": nested(pyarrow.array(ids[there])),
        f"{who}_top_logprob": nested(pyarrow.array(logprob[there])),
        f"{who}_top_text": nested(names.take(pyarrow.array(index))),
    }
