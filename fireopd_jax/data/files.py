"""Files of rows: lines and arrays of JSON, CSV, Parquet, Arrow; errors name the file and the row.

    path, pattern -> files -> (number, columns) of each row

The number is a line's in JSON lines and CSV, else a row's. Text is exact: CSV cells stay text, so
that `007` and `1.10` are what they were. Files may be compressed (.gz, .bz2, .zst).
"""

import csv
import glob
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from fireopd_jax.config import UserError, nearest
from fireopd_jax.runtime.limits import UTF_16

Rows = Iterator[tuple[int, Any]]
COMPRESSED = (".gz", ".bz2", ".zst")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
LONGEST_ROW = 2**26
"""Bytes of a row, beyond which it is no row of text."""
MOST_ROWS = 100_000_000
EXPANSION = 100
"""Ratio of a compressed file, beyond which it is made to fill the memory; texts have 3 to 20."""
UNSUSPICIOUS = 2**28
"""Bytes that any compressed file may have, whatever its ratio."""
BATCH = 1024
"""Rows of columnar files that are in memory at a time."""


def matching(pattern: str) -> list[str]:
    """Return the sorted files that match a pattern with `*`, `?` or `[`; none for another path."""
    if not glob.has_magic(pattern):
        return []
    found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    return sorted(each for each in found if Path(each).is_file())


def readable(path: str) -> bool:
    """Return whether the name is that of a kind of file with rows."""
    return _suffix(path) in READERS


def kinds() -> str:
    """Return the suffixes of files with rows, for messages."""
    return ", ".join(READERS)


def read_file(path: str) -> Rows:
    """Yield number and columns of each row of a file; an empty file is an error."""
    file = Path(path).expanduser()
    if file.exists() and not file.is_file():
        raise UserError(f"{path}: a device, pipe or folder; expected a file of rows")
    number = 0
    try:
        for number, record in READERS[_suffix(path)](file):
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}:{number}: expected an object of columns, found {kind(record)}"
                )
            if isinstance(record, Repeated):
                raise UserError(
                    f"{path}:{number}: the row has {record.key!r} twice, with different values"
                )
            check_size(record, f"{path}:{number}")
            if number > MOST_ROWS:
                raise UserError(f"{path}: over {MOST_ROWS:,} rows; expected a smaller file")
            yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        name = {".parquet": "Parquet", ".arrow": "Arrow"}.get(file.suffix, "a file of rows")
        raise UserError(f"{path}: cannot be read as {name}: {reason}") from error
    if number == 0:
        raise UserError(f"{path}: the file holds no rows")


def check_size(record: Mapping[str, Any], origin: str) -> None:
    """Raise UserError for a column whose text is far from a prompt's."""
    for name, value in record.items():
        if isinstance(value, str | bytes) and len(value) > LONGEST_ROW:
            raise UserError(
                f"{origin}: column {name!r} has {len(value):,} characters; expected at most "
                f"{LONGEST_ROW:,} in a row"
            )


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line; raise UserError for one too long or not UTF-8."""
    with pyarrow.input_stream(str(file), compression=_compression(file)) as stream:
        lines = io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]
        number = total = 0
        bound = max(UNSUSPICIOUS, EXPANSION * file.stat().st_size)
        while line := lines.readline(LONGEST_ROW + 1):
            number += 1
            total += len(line)
            if total > bound:
                raise UserError(
                    f"{file}: over {EXPANSION} times as large as its {file.stat().st_size:,} bytes "
                    "when it is decompressed; expected a file of rows"
                )
            if number == 1 and line[:2] in UTF_16:
                raise UserError(
                    f"{file}: the text is UTF-16; save it as UTF-8: "
                    f"iconv -f UTF-16 -t UTF-8 {file.name}"
                )
            if len(line) > LONGEST_ROW:
                raise UserError(
                    f"{file}:{number}: the line has over {LONGEST_ROW:,} bytes; expected a row of "
                    "text on each line"
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}:{number}: not valid UTF-8 at byte {error.start} of the line"
                ) from error


class Repeated(dict):
    """An object of JSON that has a key twice, with different values: only the last one is left."""

    def __init__(self, pairs: Sequence[tuple[str, Any]], key: str):
        super().__init__(pairs)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next((k for k, value in pairs if value != found[k]), None)
        return found if key is None else Repeated(pairs, key)
    return found


PLAIN_OBJECTS = json.JSONDecoder(object_pairs_hook=_object)


def json_rows(file: Path) -> Rows:
    """Yield the rows of JSON lines or, if the text begins with `[`, of an array of objects."""
    lines = text_lines(file)
    for number, line in lines:
        text = line.strip()
        if text.startswith("["):
            rest = "".join(each for _, each in lines)
            yield from _array_rows(file, "\n" * (number - 1) + line + rest)
            return
        if text:
            yield number, _json_line(file, number, text)
            break
    for number, line in lines:
        if text := line.strip():
            yield number, _json_line(file, number, text)


def _json_line(file: Path, number: int, text: str) -> Any:
    try:
        return PLAIN_OBJECTS.decode(text)
    except json.JSONDecodeError as error:
        comma = error.msg == "Extra data" and text[error.pos :].strip() == ","
        remedy = (
            "a comma follows the object; expected one object per line without commas between them"
            if comma
            else f"{error.msg}; expected one object per line, or an array of objects"
        )
        raise UserError(
            f"{file}:{number}: malformed JSON at column {error.colno}: {remedy}"
        ) from error
    except (RecursionError, ValueError) as error:  # Too deep, or too many digits.
        raise UserError(f"{file}:{number}: malformed JSON: {error}") from error


def _array_rows(file: Path, text: str) -> Rows:
    """Yield the elements of one JSON array, numbered from 1."""
    decoder, number = PLAIN_OBJECTS, 0
    position = _skip_blanks(text, text.index("[") + 1)
    try:
        while text[position : position + 1] != "]" or number:
            value, position = decoder.raw_decode(text, position)
            number += 1
            yield number, value
            position = _skip_blanks(text, position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = _skip_blanks(text, position + 1)
        if (end := _skip_blanks(text, position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data after the array", text, end)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}; expected "
            "an array of objects, or one object per line"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file}: malformed JSON in row {number + 1}: {error}") from error


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def csv_rows(file: Path) -> Rows:
    """Yield the rows below a header; all cells are text, empty ones None."""
    separator = SEPARATORS[_suffix(str(file))]
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader((line for _, line in text_lines(file)), delimiter=separator, strict=True)
    start = 1
    header: Sequence[str] = ()
    try:
        for cells in reader:
            if not header:
                header = cells
                _check_header(file, header, separator)
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{file}:{start}: {len(cells)} cells, the header has {len(header)} "
                        f"({', '.join(map(repr, header))}); quote cells that hold "
                        f"{OTHER_SEPARATORS[separator]}"
                    )
                yield start, {k: v or None for k, v in zip(header, cells, strict=True)}
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{start}: malformed CSV: {error}") from error


def _check_header(file: Path, header: Sequence[str], separator: str) -> None:
    """Raise UserError for a header of another separator, or with a name twice."""
    twice = next((name for name in header if list(header).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file}:1: the header has {twice!r} twice")
    for other, name in OTHER_SEPARATORS.items():
        if len(header) == 1 and other in header[0] and other != separator:
            raise UserError(
                f"{file}:1: {name} separate the header {header[0]!r}; expected "
                f"{OTHER_SEPARATORS[separator]}"
                + (", or the suffix .tsv" if other == "\t" else "")
                + (", or the suffix .csv" if other == "," else "")
            )


def parquet_rows(file: Path) -> Rows:
    """Yield the rows of a Parquet file; reads one batch of rows at a time."""
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from enumerate(dense_rows(table.iter_batches(batch_size=BATCH)), start=1)


def arrow_rows(file: Path) -> Rows:
    """Yield the rows of an Arrow file, in the stream or the file format."""
    with pyarrow.memory_map(str(file)) as source:
        stream = source.read(6) != b"ARROW1"
        source.seek(0)
        if stream:
            batches = iter(pyarrow.ipc.open_stream(source))
        else:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        pieces = (part for batch in batches for part in _slices(batch))
        yield from enumerate(dense_rows(pieces), start=1)


def _slices(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    for start in range(0, batch.num_rows, BATCH):
        yield batch.slice(start, BATCH)


def dense_rows(batches: Iterator[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[dict[str, Any]]:
    """Yield the rows of columnar batches, without the keys that a column's type adds as null.

    In a list of objects every object has all keys of the column's type: messages get each other's
    `tool_calls`, calls each other's arguments.
    """
    for batch in batches:
        for record in _records(batch):
            yield {k: _dense(v) if isinstance(v, list) else v for k, v in record.items()}


def _records(batch: pyarrow.RecordBatch | pyarrow.Table) -> list[dict[str, Any]]:
    """Return the rows; a column with values beyond Python's, such as of dates, is text."""
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        columns = [_values(column) for column in batch.columns]
        names = batch.schema.names
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except (OverflowError, ValueError):
        return column.cast(pyarrow.string()).to_pylist()


def _dense(value: Any) -> Any:
    if isinstance(value, list):
        return [_dense(each) for each in value]
    if isinstance(value, dict):
        return {key: _dense(each) for key, each in value.items() if each is not None}
    return value


def kind(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    numbers = {int: "a number", float: "a number", type(None): "null"}
    return {**names, **numbers}.get(type(value), type(value).__name__)


def missing(path: str) -> UserError:
    """Return the error for a path or pattern without a file, with the nearest name beside it."""
    if glob.has_magic(path):
        return UserError(f"data.path: no file matches {path!r}")
    if (file := Path(path).expanduser()).is_symlink() or file.exists():
        return UserError(
            f"data.path: {path!r} is a device, a pipe or a link to nothing; expected a file of rows"
        )
    if "://" in path:
        return UserError(f"data.path: {path!r} is an address; download it and give the file")
    return UserError(f"data.path: no file {path!r}{nearest(Path(path).name, beside(path))}")


def beside(path: str) -> list[str]:
    """Return the names in the folder that a path points into; none without the folder."""
    return sorted(entry.name for entry in Path(path).expanduser().parent.glob("*"))


def _suffix(path: str) -> str:
    """Return the suffix below that of a compression, `.jsonl` of `rows.jsonl.gz`."""
    file = Path(path)
    stem = file.with_suffix("") if file.suffix in COMPRESSED else file
    bare = stem.suffix.lower()
    return "" if file.suffix in COMPRESSED and bare in (".parquet", ".arrow") else bare


def _compression(file: Path) -> str | None:
    names = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
    return names.get(file.suffix)


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
