"""Rows of all sources: files, data sets of the library `datasets`, and built-in tasks.

    path -> tables (name, rows of columns) -> Columns -> Row -> Data (rows, notes) -> route

A source is read completely and in order; several sources are concatenated. The notes say how each
source was understood, for the log of a run.
"""

import dataclasses
import glob
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from fireopd_jax.config import UserError, nearest
from fireopd_jax.data import files, hub
from fireopd_jax.data.repeats import distinct, find_repeats
from fireopd_jax.data.rows import Row, RowReader
from fireopd_jax.data.schemas import Columns, check_late, recognise
from fireopd_jax.data.settings import DataConfig, SourceConfig
from fireopd_jax.data.tasks import task_names, task_rows

SAMPLE = 1000
"""First rows of a source, whose columns are recognised together."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows that were understood alike: those of a file, or of several with equal columns."""

    names: tuple[str, ...]
    source: int
    """Index in the mixture."""
    columns: Columns
    num_rows: int
    num_answered: int
    counts: Mapping[str, int]
    """What was done with the last turns of conversations, in words, with the number of rows."""

    def notes(self) -> Iterator[str]:
        """Yield how the rows were understood, a line each."""
        first, *others = self.names
        where = f"{first} and {len(others)} more" if others else first
        yield f"{where}: {self.num_rows} rows, {self.columns.described()}"
        if 0 < self.num_answered < self.num_rows:
            missing = self.num_rows - self.num_answered
            yield f"{where}: {missing} rows have no answer; they are trained on, not held out"
        for done, count in self.counts.items():
            yield f"{where}: {count} conversations: {done}"


@dataclasses.dataclass(frozen=True)
class Data:
    """All rows, and how they were understood."""

    rows: list[Row]
    parts: tuple[Part, ...]
    num_repeated: int
    """Rows that repeat the prompt of an earlier one."""
    num_dropped: int
    """Of these, the ones that are left out (`data.duplicates=drop`)."""
    conflicts: tuple[tuple[Row, Row], ...]
    """Pairs of rows with one prompt and two answers."""

    def notes(self) -> Iterator[str]:
        """Yield how the rows were understood, and their repetitions, a line each."""
        for part in self.parts:
            yield from part.notes()
        if self.num_repeated:
            done = "dropped" if self.num_dropped else "kept (data.duplicates=drop drops them)"
            yield f"{self.num_repeated} rows repeat the prompt of an earlier row: {done}"
        if self.conflicts:
            one, other = self.conflicts[0]
            more = f"; {len(self.conflicts)} such rows" if len(self.conflicts) > 1 else ""
            yield (
                f"one prompt has two answers: {one.origin} ({one.answer!r}) and "
                f"{other.origin} ({other.answer!r}){more}"
            )


def read_rows(config: DataConfig) -> list[Row]:
    """Return the rows of all sources, in order."""
    return read_data(config).rows


def read_data(config: DataConfig) -> Data:
    """Return the rows of all sources, in order, and how they were understood."""
    rows: list[Row] = []
    parts: list[Part] = []
    for index, source in enumerate(config.sources):
        alike: dict[Columns, list[tuple[str, list[Row], Counter[str]]]] = {}
        for name, table in tables(source):
            columns, read, counts = _read(name, table, source, index, config)
            alike.setdefault(columns, []).append((name, read, counts))
            rows += read
        parts += [_part(columns, index, each) for columns, each in alike.items()]
    repeated, conflicts = find_repeats(rows)
    drops = config.duplicates == "drop"
    return Data(
        rows=distinct(rows) if drops else rows,
        parts=tuple(parts),
        num_repeated=repeated,
        num_dropped=repeated if drops else 0,
        conflicts=conflicts,
    )


def _read(
    name: str, table: files.Rows, source: SourceConfig, index: int, config: DataConfig
) -> tuple[Columns, list[Row], Counter[str]]:
    """Return columns, rows and counts of one table."""
    first = list(itertools.islice(table, SAMPLE))
    columns = recognise([record for _, record in first], source, f"{name}:{first[0][0]}")
    teacher, tests = getattr(source, "teacher", None), config.grader == "code"
    reader = RowReader(columns, index, teacher, config.routes, tests=tests)
    seen = {column for _, record in first for column in record}
    read = [reader(record, f"{name}:{number}") for number, record in first]
    for number, record in table:
        if late := record.keys() - seen:
            check_late(late, columns, f"{name}:{number}")
            seen |= late
        read.append(reader(record, f"{name}:{number}"))
    return columns, read, reader.counts


def _part(
    columns: Columns, source: int, alike: Sequence[tuple[str, list[Row], Counter[str]]]
) -> Part:
    return Part(
        names=tuple(name for name, _, _ in alike),
        source=source,
        columns=columns,
        num_rows=sum(len(rows) for _, rows, _ in alike),
        num_answered=sum(row.answer is not None for _, rows, _ in alike for row in rows),
        counts=sum((counts for _, _, counts in alike), Counter()),
    )


def tables(source: SourceConfig) -> Iterator[tuple[str, files.Rows]]:
    """Yield name and rows of each file or data set of a source; none of them is empty."""
    paths = (source.path,) if isinstance(source.path, str) else source.path
    if not paths:
        raise UserError("data.path: the list is empty; expected a file or a built-in task")
    for path in paths:
        yield from _tables(path, source)


def _tables(path: str, source: SourceConfig) -> Iterator[tuple[str, files.Rows]]:
    if path.startswith("builtin:"):
        _refuse_hub_keys(path, source)
        yield path, iter(enumerate(task_rows(path), start=1))
        return
    file = Path(path).expanduser()
    found = [] if file.exists() else files.matching(path)
    if file.is_dir() or (not file.exists() and not found and _is_on_hub(path)):
        yield hub.read_dataset(path, source)
        return
    _refuse_hub_keys(path, source)
    if not found and glob.has_magic(path) and not file.exists():
        raise files.missing(path)
    for each in found or [path]:
        if not files.readable(each):
            there = Path(each).expanduser().is_file()
            known = [] if there else [*files.beside(each), *task_names()]
            raise UserError(
                f"data.path: {each!r} is of an unknown kind; expected {files.kinds()}, a folder, "
                f"OWNER/NAME of the hub or builtin:TASK{nearest(Path(each).name, known)}"
            )
        if not Path(each).expanduser().is_file():
            raise files.missing(each)
        yield each, files.read_file(each)


def _is_on_hub(path: str) -> bool:
    return not files.readable(path) and hub.is_hub_name(path)


def _refuse_hub_keys(path: str, source: SourceConfig) -> None:
    """Raise UserError for keys of the hub beside a file, which they would not change."""
    for key in ("subset", "split", "revision"):
        if (value := getattr(source, key)) is not None:
            raise UserError(
                f"data.{key}={value!r}: {path!r} is neither a folder nor a data set of the "
                "hub, which have it"
            )


def route(
    rows: Sequence[Row], teachers: Sequence[str], column: str | None
) -> Int32[np.ndarray, " N"]:
    """Return the index of each row's teacher; raise `UserError` on an unknown name.

    `column` is that of the teachers' names, None if none is configured; sources of a mixture may
    name their teachers all the same.
    """
    if column is None and all(row.teacher is None for row in rows):
        if len(teachers) != 1:
            raise UserError(
                f"data.teacher_column: {len(teachers)} teachers ({', '.join(teachers)}) need a "
                "column that names each row's teacher"
            )
        return np.zeros(len(rows), np.int32)
    index = {name: position for position, name in enumerate(teachers)}
    for row in rows:
        if row.teacher not in index:
            name = "null" if row.teacher is None else repr(row.teacher)
            named = "its source" if column is None else f"column {column!r}"
            raise UserError(
                f"{row.origin}: {named} names an unknown teacher: {name}; "
                f"known are {', '.join(teachers)}{nearest(row.teacher or '', teachers)}"
                + ("" if column is None else "; data.routes maps other values to teachers")
            )
    return np.asarray([index[row.teacher or ""] for row in rows], np.int32)
