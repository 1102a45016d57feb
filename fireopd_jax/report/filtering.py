"""What the filter has kept and dropped, and each row's rank, from which a page filters anew.

completions/*.parquet -> columns of rows: score, threshold, rank, teacher, length, correctness

The rule is that of `method.filtering.trajectories`: of the n rows that are ranked together the
floor(rho n + 1e-9) lowest are dropped, of equal scores the earlier row first, NaN lowest.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from fireopd_jax.report.curves import shorter
from fireopd_jax.report.reading import RunFiles

MOST_ROWS = 4000
"""Rows of a page, of steps that lie evenly over the run."""
RANKING = ("teacher_quantile", "random_drop", "length_drop")
"""Filters that drop a fraction of the rows by their rank."""
SCORED = (*RANKING, "repetition_guard", "gap_bound")
"""Filters that judge rows by a score."""
COLUMNS = ("row", "prompt", "correct", "teacher", "kept", "tokens", "teacher_score")
REASONS = ("dropped_by", "filter_score", "filter_threshold")
"""Columns that older versions did not write."""


def filtering(run: RunFiles, files: Sequence[Path]) -> dict[str, Any]:
    """Return the filter's settings, and its rows as columns; no rows where none were saved."""
    filters = list(settings(run.setting("method.filter", {})))
    ranking = next((each for each in reversed(filters) if each.get("kind") in RANKING), None)
    own = ranking if ranking is not None else {"kind": "teacher_quantile", "drop_fraction": 0.0}
    found: dict[str, Any] = {
        "kind": run.setting("method.filter.kind"),
        "filters": [str(each.get("kind")) for each in filters],
        "ranking": own.get("kind"),
        "fraction": own.get("drop_fraction", 0.2),
        "applied": ranking is not None,
        "scope": own.get("scope", "batch"),
        "score": score_name(own),
        "window": own.get("window", 0),
        "prompts": [],
        "rows": {},
    }
    place = len(filters) if ranking is None else filters.index(ranking)
    earlier = {str(each.get("kind")) for each in filters[:place]}
    # Of a row that is kept the file has the score of the last filter with one.
    last = ranking is not None and not any(x.get("kind") in SCORED for x in filters[place + 1 :])
    parts = [part for file in files if (part := _rows(run, file, own, earlier, last)) is not None]
    if not parts:
        run.note("no trajectories were saved: run.completions_every is 0, or none was due yet")
        return found
    parts = spread(parts, MOST_ROWS)
    prompts: dict[str, int] = {}
    for part in parts:
        texts = part.pop("prompt")
        part["prompt"] = [prompts.setdefault(text[:80], len(prompts)) for text in texts]
    found["rows"] = {key: [x for part in parts for x in part[key]] for key in parts[0]}
    found["prompts"] = list(prompts)
    return found


def settings(filter: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of each filter in a filter."""
    if filter.get("kind") == "all_of" and isinstance(filter.get("filters"), list):
        yield from (each for each in filter["filters"] if isinstance(each, Mapping))
    elif filter:
        yield filter


def score_name(filter: Mapping[str, Any]) -> str:
    """Return what a ranking filter ranks by, in words."""
    if filter.get("kind") == "random_drop":
        return "random number"
    if filter.get("kind") == "length_drop":
        return f"length, the {filter.get('drop', 'longest')} first"
    if filter.get("score") == "student_relative":
        return "mean log-ratio of teacher to student"
    return "teacher’s mean log-prob of a response"


def _rows(
    run: RunFiles, file: Path, ranking: Mapping[str, Any], earlier: set[str], last: bool
) -> dict[str, list[Any]] | None:
    """Return the columns of a step's rows; None where its file is damaged.

    `earlier` are the filters before the one that ranks, `last` whether none after it has a score.
    """
    table = run.table(file, (*COLUMNS, *REASONS))
    step = step_of(file)
    if table is None or step is None or not {"kept", "tokens"} <= set(table.column_names):
        return None
    if "dropped_by" not in table.column_names:
        run.note(
            "completions/ were written by an older version, without the reason for which a row was "
            "dropped and the filter's score: the mean log-prob by the teacher is shown"
        )
    rows = table.num_rows
    by = column(table, "dropped_by", [None] * rows)
    score = _floats(column(table, "filter_score", [None] * rows))
    if not np.isfinite(score).any() or not last:
        score = _floats(column(table, "teacher_score", [None] * rows))
    score[[each in earlier for each in by]] = np.nan
    length = pyarrow.compute.call_function("list_value_length", [table["tokens"]]).to_pylist()
    teacher = [str(x) for x in column(table, "teacher", [""] * rows)]
    ranked = np.asarray([x not in earlier and n > 0 for x, n in zip(by, length, strict=True)])
    names = sorted(set(teacher))
    group = np.zeros(rows, int)
    if ranking.get("scope") == "teacher":
        group = np.asarray([names.index(each) for each in teacher], int)
    longest = ranking.get("kind") == "length_drop" and ranking.get("drop") != "shortest"
    rank, of = ranks(-score if longest else score, group, ranked)
    return {
        "step": [step] * rows,
        "row": column(table, "row", [None] * rows),
        "prompt": [str(x) for x in column(table, "prompt", [""] * rows)],
        "teacher": teacher,
        "length": length,
        "correct": column(table, "correct", [None] * rows),
        "kept": column(table, "kept", [None] * rows),
        "by": by,
        "score": [shorter(x, 6) for x in score.tolist()],
        "threshold": [shorter(x, 6) for x in column(table, "filter_threshold", [None] * rows)],
        "rank": rank.tolist(),
        "of": of.tolist(),
    }


def _floats(values: list[Any]) -> np.ndarray:
    return np.asarray([np.nan if each is None else each for each in values], float)


def ranks(
    score: np.ndarray, group: np.ndarray, ranked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's rank among the ranked rows of its group, and their number; -1 and 0 else.

    Ascending by score; NaN is lowest, equal scores are in the order of the rows.
    """
    rank, of = np.full(len(score), -1), np.zeros(len(score), int)
    score = np.where(np.isnan(score), -np.inf, score)
    for each in np.unique(group):
        inside = np.flatnonzero(ranked & (group == each))
        rank[inside[np.argsort(score[inside], kind="stable")]] = np.arange(len(inside))
        of[inside] = len(inside)
    return rank, of


def column(table: pyarrow.Table, name: str, default: list[Any]) -> list[Any]:
    """Return the values of a column; `default` where an older version did not write it."""
    return table[name].to_pylist() if name in table.column_names else default


def step_of(file: Path) -> int | None:
    """Return the step that a file of trajectories is of."""
    number = file.stem.rpartition("_")[2]
    return int(number) if number.isdigit() else None


def spread(parts: list[dict[str, list[Any]]], most: int) -> list[dict[str, list[Any]]]:
    """Return steps that lie evenly over the run, the first and the last among them, by rows."""
    per_step = max(len(part["step"]) for part in parts)
    count = max(1, most // max(per_step, 1))
    return [parts[i] for i in evenly(len(parts), count)]


def evenly(length: int, count: int) -> list[int]:
    """Return at most `count` indices of so many things, evenly, the last one among them."""
    if length <= count:
        return list(range(length))
    if count == 1:
        return [length - 1]
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})
