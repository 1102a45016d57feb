"""Every kind of file gives the same rows; every broken one is one clear line."""

import bz2
import gzip
import json
import os

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data import files
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_rows

ROWS = [{"prompt": f"{i}+{i}?", "answer": str(2 * i)} for i in range(1, 5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS)


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def arrow(open_writer):
    table = pyarrow.Table.from_pylist(ROWS)
    sink = pyarrow.BufferOutputStream()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "rows.jsonl": LINES.encode(),
    "rows.ndjson": LINES.encode(),
    "rows.json": LINES.encode(),
    "indented.json": json.dumps(ROWS, indent=1).encode(),
    "array.json": b"\n " + json.dumps(ROWS).encode() + b"\n\n",
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "rows.jsonl.zst": zstd(LINES.encode()),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv": CSV.encode(),
    "rows.csv.gz": gzip.compress(CSV.encode()),
    "bom.csv": b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
    "rows.tsv": CSV.replace(",", "\t").encode(),
    "rows.parquet": parquet(),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
    "file.arrow": arrow(pyarrow.ipc.new_file),
}


def read(file, **keys):
    return read_rows(DataConfig(path=str(file), **keys))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(KINDS[name])
    rows = read(file)
    assert [(row.prompt[0]["content"], row.answer) for row in rows] == [
        (row["prompt"], row["answer"]) for row in ROWS
    ]
    first = 2 if ".csv" in name or ".tsv" in name else 1  # the header is a line
    assert [row.origin for row in rows] == [f"{file}:{first + i}" for i in range(4)]


def test_cells_of_csv_are_text_and_may_hold_lines(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,answer\n"a, ""b""\nc",007\nd,1.10\ne,\n')
    rows = read(file)
    assert rows[0].prompt[0]["content"] == 'a, "b"\nc'
    assert [row.answer for row in rows] == ["007", "1.10", None]
    assert [row.origin.rpartition(":")[2] for row in rows] == ["2", "4", "5"]


def test_a_pattern_reads_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "d.jsonl").write_text('{"problem": "d"}')
    rows = read(tmp_path / "*.jsonl")
    assert [row.prompt[0]["content"] for row in rows] == ["a.jsonl", "b.jsonl"]
    assert [row.prompt[0]["content"] for row in read(tmp_path / "**" / "*.jsonl")][-1] == "d"
    assert rows[0].origin == f"{tmp_path}/a.jsonl:1"
    with pytest.raises(UserError, match=r"no file matches '.*/\*\.parquet'"):
        read(tmp_path / "*.parquet")
    # A file of that very name is no pattern.
    (tmp_path / "x[1].jsonl").write_text('{"prompt": "bracket"}')
    assert read(tmp_path / "x[1].jsonl")[0].prompt[0]["content"] == "bracket"


BROKEN = {
    "utf16.jsonl": (LINES.encode("utf-16"), "the text is UTF-16; .*iconv -f UTF-16 -t UTF-8"),
    "utf16.csv": (CSV.encode("utf-16"), "the text is UTF-16"),
    "comma.jsonl": (b'{"prompt": "a"},\n{"prompt": "b"},\n', r":1: .*column 16: a comma follows"),
    "torn.json": (b'[{"prompt": "a"},\n {"prompt": ]', r":2: malformed JSON at column 13: Exp"),
    "unclosed.json": (b'[{"prompt": "a"}', r":1: malformed JSON at column 17: Expecting ',' or"),
    "missing.json": (b'[{"prompt": "a"}\n {"prompt": "b"}]', r":2: .*column 2: Expecting ','"),
    "after.json": (b'[{"prompt": "a"}]\n{}', r":2: .*Extra data after the array"),
    "texts.json": (b'["a", "b"]', r":1: expected an object of columns, found a text"),
    "none.json": (b"[ ]", "the file holds no rows"),
    "deep.json": (b'[{"prompt": ' + b"[" * 100_000, "malformed JSON in row 1"),
    "latin.csv": (b"prompt,answer\n\xe9t\xe9,1\n", r":2: not valid UTF-8 at byte 0"),
    "semicolon.csv": (b"prompt;answer\na;1\n", r":1: semicolons separate the header .*commas"),
    "tab.csv": (b"prompt\tanswer\na\t1\n", r":1: tabs separate .*suffix \.tsv"),
    "comma.tsv": (b"prompt,answer\na,1\n", r":1: commas separate .*suffix \.csv"),
    "cells.csv": (b"prompt,answer\na,1\nb,2,3\n", r":3: 3 cells, the header has 2 .*quote"),
    "few.csv": (b"prompt,answer\na\n", r":2: 1 cells, the header has 2"),
    "quote.csv": (b'prompt,answer\n"a,1\n', r":2: malformed CSV: unexpected end of data"),
    "twice.csv": (b"prompt,prompt\na,1\n", "the header has 'prompt' twice"),
    "header.csv": (b"prompt,answer\n", "the file holds no rows"),
    "plain.jsonl.gz": (LINES.encode(), "cannot be read as a file of rows: zlib"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 99)[:-30], "cannot be read|malformed|no rows"),
    "broken.arrow": (b"not arrow at all", "cannot be read as Arrow"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_far_from_a_prompt_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_ROW", 1000)
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "x" * 2000}))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the line has over 1,000 bytes"):
        read(lines)
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "x" * 2000]}), table)
    with pytest.raises(UserError, match=r"rows\.parquet:2: column 'prompt' has 2,000 characters"):
        read(table)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_with_two_values_for_a_key_is_refused(tmp_path, name):
    text = '{"prompt": "a", "answer": "1", "prompt": "b"}'
    (tmp_path / name).write_text(f"[{text}]" if name == "a.json" else text)
    with pytest.raises(UserError, match=rf"{name}:1: the row has 'prompt' twice, with different"):
        read_rows(DataConfig(path=str(tmp_path / name)))
    (tmp_path / name).write_text('{"prompt": "a", "prompt": "a"}')
    assert len(read_rows(DataConfig(path=str(tmp_path / name)))) == 1


def test_a_number_beyond_a_float_is_no_answer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": 1e400}')
    with pytest.raises(UserError, match=r"a.jsonl:1: column 'answer': the number is too large"):
        read_rows(DataConfig(path=str(tmp_path / "a.jsonl")))


def test_a_date_beyond_those_of_python_is_a_text(tmp_path):
    when = pyarrow.array([2**62, 0], pyarrow.timestamp("ms"))
    table = pyarrow.table({"prompt": ["a", "b"], "when": when})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in files.read_file(str(tmp_path / "a.parquet"))]
    assert [row["prompt"] for row in rows] == ["a", "b"] and str(2**62) in rows[0]["when"]


def test_keys_of_the_hub_beside_a_file_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES)
    for path in (file, "builtin:addition-1"):
        for key in ("subset", "split", "revision"):
            with pytest.raises(UserError, match=rf"data\.{key}='test': .*neither a folder nor"):
                read(path, **{key: "test"})


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.bz2"])
def test_a_compressed_file_that_fills_the_memory_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "UNSUSPICIOUS", 10_000)
    text = b"prompt,answer\n" if ".csv" in name else b"[" if ".json." in name else b""
    text += b'{"prompt": "2+2=", "answer": "4"}\n' * 100_000
    file = tmp_path / name
    file.write_bytes(gzip.compress(text) if name.endswith("gz") else bz2.compress(text))
    with pytest.raises(UserError, match="over 100 times as large as its"):
        list(files.read_file(str(file)))


def test_devices_pipes_and_loops_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("pipe.jsonl", "zero.jsonl"):
        with pytest.raises(UserError, match="a device, pipe or folder"):
            list(files.read_file(str(tmp_path / name)))
        assert "a device, a pipe" in str(files.missing(str(tmp_path / name)))
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        list(files.read_file(str(tmp_path / "loop.jsonl")))
