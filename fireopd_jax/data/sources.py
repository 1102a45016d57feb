"""Rows of text from files and built-in tasks; errors name the file, the line and the column.

    .jsonl, .parquet, builtin:task -> records (origin, columns) -> Row -> route

A row has text only; `pipeline.py` tokenizes it. Only the role and the content of a message are
used. A source is read completely and in order; several sources are concatenated.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Int32
from pydantic import Field

from fireopd_jax.config import UserError, config, nearest
from fireopd_jax.data.tasks import task_names, task_rows
from fireopd_jax.text.chat import Message

SUFFIXES = (".jsonl", ".json", ".parquet")


@config
class DataConfig:
    """Sources of the prompts."""

    path: str | tuple[str, ...] = "builtin:addition-2"
    """A .jsonl, .json (one object a line) or .parquet file, or a built-in task
    (`builtin:addition-D`, `builtin:subtraction-D`); or a list of them, concatenated."""
    prompt_column: str = "prompt"
    """Column of the prompt: a text, or a list of messages with `role` and `content`."""
    answer_column: str | None = None
    """Column of the answer that responses are graded against. null: `answer`, if a row has it."""
    reference_column: str | None = None
    """Column of a reference response. null: `reference`, if a row has it."""
    privileged_column: str | None = None
    """Column of the solution that only the teacher sees, for methods with privileged information.
    null: `privileged`, if a row has it, else the reference response."""
    teacher_column: str | None = None
    """Column with the name of each row's teacher. null: there is a single teacher."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest prompt, as tokenized for the student and for the row's teacher; prompts are padded
    to this length."""
    overlong: Literal["drop", "error"] = "drop"
    """Rows with a longer prompt: `drop` drops and counts them, `error` raises an error."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One prompt, with its answer, reference response and teacher, where given."""

    prompt: tuple[Message, ...]
    answer: str | None
    reference: str | None
    teacher: str | None
    origin: str
    """File and line, for error messages."""
    privileged: str | None = None
    """Solution that only the teacher sees."""


def read_rows(config: DataConfig) -> list[Row]:
    """Return the rows of all sources, in order."""
    paths = (config.path,) if isinstance(config.path, str) else config.path
    if not paths:
        raise UserError("data.path: the list is empty; expected a file or a built-in task")
    return [parse_row(record, origin, config) for path in paths for origin, record in records(path)]


def route(
    rows: Sequence[Row], teachers: Sequence[str], column: str | None
) -> Int32[np.ndarray, " N"]:
    """Return the index of each row's teacher; raise `UserError` on an unknown name."""
    if column is None:
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
            raise UserError(
                f"{row.origin}: column {column!r} names an unknown teacher: {name}; "
                f"known are {', '.join(teachers)}{nearest(row.teacher or '', teachers)}"
            )
    return np.asarray([index[row.teacher or ""] for row in rows], np.int32)


def records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the origin and the columns of each row of one source; an empty source is an error."""
    if path.startswith("builtin:"):
        for number, record in enumerate(task_rows(path), start=1):
            yield f"{path}:{number}", record
        return
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise UserError(
            f"data.path: {path!r} is of an unknown kind; expected {', '.join(SUFFIXES)} "
            f"or builtin:TASK{nearest(path, task_names())}"
        )
    if not file.is_file():
        beside = sorted(entry.name for entry in file.parent.glob("*")) if not file.exists() else []
        raise UserError(f"data.path: no file {path!r}{nearest(file.name, beside)}")
    number = 0
    lines = parquet_records(file) if file.suffix == ".parquet" else json_records(file)
    for number, record in lines:
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected an object of columns, found {kind(record)}")
        yield f"{path}:{number}", record
    if number == 0:
        raise UserError(f"{path}: the file holds no rows")


def json_records(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the value of each line that is not blank."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}:{number}: not valid UTF-8 at byte {error.start} of the line"
                ) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{file}:{number}: malformed JSON at column {error.colno}: {error.msg}; "
                    "expected one object per line"
                ) from error
            except (RecursionError, ValueError) as error:  # Too deep, or too many digits.
                raise UserError(f"{file}:{number}: malformed JSON: {error}") from error


def parquet_records(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the row number and the columns of each row; reads one record batch at a time."""
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for block in table.iter_batches():
                for record in block.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read as Parquet: {reason}") from error


def parse_row(record: Mapping[str, Any], origin: str, config: DataConfig) -> Row:
    """Return the row of one record, with the columns that the configuration names."""
    prompt = column_value(record, config.prompt_column, "prompt_column", origin)
    reference = optional_text(record, "reference", config.reference_column, origin)
    privileged = optional_text(record, "privileged", config.privileged_column, origin)
    return Row(
        prompt=parse_prompt(prompt, config.prompt_column, origin),
        answer=optional_text(record, "answer", config.answer_column, origin),
        reference=reference,
        privileged=reference if privileged is None else privileged,
        # No default column name: rows are routed only if the configuration asks for it.
        teacher=config.teacher_column
        and optional_text(record, "teacher", config.teacher_column, origin),
        origin=origin,
    )


def optional_text(
    record: Mapping[str, Any], field: str, column: str | None, origin: str
) -> str | None:
    """Return the text of `column`, which must exist, or, if None, of `field`, if it exists."""
    if column is None and field not in record:
        return None
    value = column_value(record, column or field, f"{field}_column", origin)
    return plain_text(value, column or field, origin)


def column_value(record: Mapping[str, Any], column: str, key: str, origin: str) -> Any:
    """Return a column's value; raise `UserError` with the existing columns if it is missing."""
    if column not in record:
        raise UserError(
            f"{origin}: no column {column!r} (data.{key}); the row has "
            f"{', '.join(map(repr, record)) or 'none'}{nearest(column, record)}"
        )
    return record[column]


def parse_prompt(value: Any, column: str, origin: str) -> tuple[Message, ...]:
    """Return a prompt as a conversation, without a trailing assistant message."""
    where = f"{origin}: column {column!r}"
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a text or a list of messages, found {kind(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{where}: message {number}: expected an object, found {kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = kind(message[key]) if key in message else "none"
                raise UserError(f"{where}: message {number}: expected a text {key}, found {found}")
            check_unicode(message[key], where)
        messages.append(Message(role=message["role"], content=message["content"]))
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["content"].strip() for message in messages):
        raise UserError(f"{where}: the prompt is empty")
    return tuple(messages)


def plain_text(value: Any, column: str, origin: str) -> str | None:
    """Return a text or a number as text; whole floats lose `.0`, NaN and null become None.

    Tables with missing values store integers as floats: 18.0 stands for `18`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"{origin}: column {column!r}: expected a text or a number, found {kind(value)}"
        )
    text = str(value)
    check_unicode(text, f"{origin}: column {column!r}")
    return text


def check_unicode(text: str, where: str) -> None:
    r"""Raise on an unpaired surrogate, such as JSON's \ud800: tokenizers cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is an unpaired surrogate") from error


def kind(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    numbers = {int: "a number", float: "a number", type(None): "null"}
    return {**names, **numbers}.get(type(value), type(value).__name__)
