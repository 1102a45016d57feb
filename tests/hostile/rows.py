"""Hostile rows: files that are broken, columns that are missing, values that nobody meant."""

import gzip
import io
import json
import struct
import zipfile

import pyarrow
import pyarrow.parquet

from tests.hostile.case import Case, read

GOOD = '{"prompt": "1+1?", "answer": "2"}\n'


def good(count: int) -> str:
    return "".join(row(prompt=f"{i}+{i}?", answer=str(2 * i)) for i in range(count))


def parquet(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def row(**values: object) -> str:
    return json.dumps(values) + "\n"


def zipped() -> bytes:
    to = io.BytesIO()
    with zipfile.ZipFile(to, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return to.getvalue()


WHOLE = parquet([{"prompt": "1+1?", "answer": "2"}] * 50)

CASES = (
    read("an empty file", "", "bad.jsonl"),
    read("only empty lines", "\n\n  \n", "bad.jsonl"),
    read("only a byte order mark", b"\xef\xbb\xbf", "bad.jsonl"),
    read("a byte order mark before rows", b"\xef\xbb\xbf" + good(8).encode(), "2.7 epochs", 0),
    read("Windows' line ends", good(8).replace("\n", "\r\n"), "2.7 epochs", 0),
    read("no line end after the last row", good(8).strip(), "2.7 epochs", 0),
    read("UTF-16", (GOOD * 4).encode("utf-16"), "UTF-16"),
    read("Latin-1", '{"prompt": "caf\xe9?", "answer": "2"}\n'.encode("latin-1"), "bad.jsonl:1"),
    read("a row cut short", GOOD + '{"prompt": "1', "bad.jsonl:2"),
    read("NUL bytes after a crash", GOOD.encode() + b"\0" * 4096, "bad.jsonl:2"),
    read("a list as a row", GOOD + "[1, 2]\n", "bad.jsonl:2"),
    read("a number as a row", GOOD + "7\n", "bad.jsonl:2"),
    read("null as a row", GOOD + "null\n", "bad.jsonl:2"),
    read(
        "a number of 10,000 digits",
        GOOD + '{"prompt": "a", "answer": ' + "9" * 10_000 + "}\n",
        "bad.jsonl",
    ),
    read("100,000 brackets in a row", GOOD + '{"prompt": ' + "[" * 100_000 + "\n", "bad.jsonl:2"),
    read("NaN as an answer", good(8) + '{"prompt": "a", "answer": NaN}\n', "", 0),
    read("half a surrogate pair", GOOD + '{"prompt": "a\\ud800", "answer": "2"}\n', "bad.jsonl:2"),
    read(
        "a key twice in a row",
        GOOD * 2 + '{"prompt": "a", "prompt": "b", "answer": "2"}\n',
        "prompt",
    ),
    read("an empty prompt", GOOD + row(prompt="", answer="2"), "bad.jsonl:2"),
    read("a prompt of spaces", GOOD + row(prompt="   ", answer="2"), "bad.jsonl:2"),
    read("a prompt that is null", GOOD + row(prompt=None, answer="2"), "bad.jsonl:2"),
    read("a prompt that is a number", GOOD + row(prompt=3, answer="2"), "bad.jsonl:2"),
    read(
        "a prompt that is a list of texts", GOOD + row(prompt=["a", "b"], answer="2"), "bad.jsonl:2"
    ),
    read("messages without a role", row(messages=[{"content": "a"}]) * 2, "role"),
    read(
        "messages with an unknown role",
        row(messages=[{"role": "wizard", "content": "a"}]) * 2,
        "wizard",
    ),
    read("messages without a content", row(messages=[{"role": "user"}]) * 2, "content"),
    read(
        "an image in a message",
        row(messages=[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]) * 2,
        "image",
    ),
    read("no message", row(messages=[]) * 2, "messages"),
    read("a message that is a text", row(messages=["hi"]) * 2, "bad.jsonl:1"),
    read(
        "only a system message",
        "".join(
            row(messages=[{"role": "system", "content": str(i)}], answer="2") for i in range(8)
        ),
        "",
        0,
    ),
    read("no column of prompts", row(text="a", answer="b") * 2, "data.prompt_column"),
    read("a prompt that a later row lacks", GOOD + row(answer="b"), "bad.jsonl:2"),
    read("an answer that a later row lacks", good(8) + row(prompt="b"), "", 0),
    read(
        "answers that are lists",
        "".join(row(prompt=str(i), answer=["2", "3"]) for i in range(8)),
        "answer",
        0,
    ),
    read("answers that are objects", row(prompt="a", answer={"x": 1}) * 4, "answer"),
    read(
        "answers that are numbers",
        "".join(row(prompt=str(i), answer=2 * i) for i in range(8)),
        "2.7 epochs",
        0,
    ),
    read("special tokens in a prompt", good(8).replace("+", "<|im_end|>"), "", 0),
    read("one prompt, all the same", GOOD * 8, "eval.problems=2"),
    read("fewer rows than a batch", good(3), "", 0),
    read(
        "prompts that are all too long",
        row(prompt="a" * 500, answer="2") * 4,
        "data.max_prompt_tokens",
    ),
    read("a prompt of 5 MB", good(8) + row(prompt="a " * 2_500_000, answer="2"), "", 0),
    read(
        "a JSON array with a trailing comma",
        "[" + GOOD + "," + GOOD + ",]",
        "bad.json",
        name="bad.json",
    ),
    read(
        "an object of columns",
        '{"prompt": ["a", "b"], "answer": ["1", "2"]}',
        "bad.json",
        name="bad.json",
    ),
    read("an empty JSON array", "[]", "bad.json", name="bad.json"),
    read("CSV with a header only", "prompt,answer\n", "bad.csv", name="bad.csv"),
    read("CSV with an unclosed quote", 'prompt,answer\n"1+1?,2\n', "bad.csv", name="bad.csv"),
    read("CSV with too many cells", "prompt,answer\n1+1?,2,3\n", "bad.csv:2", name="bad.csv"),
    read("CSV with too few cells", "prompt,answer\n1+1?\n", "bad.csv:2", name="bad.csv"),
    read("CSV with a column twice", "prompt,prompt\na,b\n", "prompt", name="bad.csv"),
    read("CSV with semicolons", "prompt;answer\n1+1?;2\n", "bad.csv", name="bad.csv"),
    read("CSV without a header", "1+1?,2\n2+2?,4\n", "data.prompt_column", name="bad.csv"),
    read(
        "CSV with a NUL",
        "prompt,answer\n" + "".join(f"{i}\0b,2\n" for i in range(8)),
        "",
        0,
        name="bad.csv",
    ),
    read(
        "gzip cut short",
        gzip.compress((GOOD * 500).encode())[:-20],
        "bad.jsonl.gz",
        name="bad.jsonl.gz",
    ),
    read(
        "gzip with another byte",
        bytes([*(c := bytearray(gzip.compress((GOOD * 500).encode())))[:40], c[40] ^ 255, *c[41:]]),
        "bad.jsonl.gz",
        name="bad.jsonl.gz",
    ),
    read("text with a name of gzip", GOOD, "bad.jsonl.gz", name="bad.jsonl.gz"),
    read("gzip with a name of text", gzip.compress(GOOD.encode()), "bad.jsonl", name="bad.jsonl"),
    read(
        "zstd that is noise",
        b"\x28\xb5\x2f\xfd" + bytes(range(200)),
        "bad.jsonl.zst",
        name="bad.jsonl.zst",
    ),
    read("a zip", zipped(), "bad.zip", name="bad.zip"),
    read("a spreadsheet", b"PK\x03\x04" + bytes(100), "bad.xlsx", name="bad.xlsx"),
    read("a Parquet cut short", WHOLE[:-10], "bad.parquet", name="bad.parquet"),
    read(
        "a Parquet with noise inside",
        WHOLE[:20] + bytes(60) + WHOLE[80:],
        "bad.parquet",
        name="bad.parquet",
    ),
    read(
        "a Parquet without rows",
        parquet([{"prompt": "a"}])[:4] + b"PAR1",
        "bad.parquet",
        name="bad.parquet",
    ),
    read(
        "a Parquet with a footer of 2 GB",
        b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
        "bad.parquet",
        name="bad.parquet",
    ),
    read("text with a name of Parquet", GOOD, "bad.parquet", name="bad.parquet"),
    read("an Arrow file that is noise", b"ARROW1\0\0" + bytes(64), "bad.arrow", name="bad.arrow"),
    read("no extension", good(8), "rows", name="rows"),
    Case(
        "a file that is not there",
        "fireopd train small.yaml data.path=promts.jsonl",
        "prompts.jsonl",
    ),
    Case(
        "a pattern that finds nothing",
        "fireopd train small.yaml 'data.path=rows/*.jsonl'",
        "rows/*.jsonl",
    ),
    Case("an empty folder", "mkdir rows; fireopd train small.yaml data.path=rows", "rows"),
    Case("a folder of a model", "fireopd train small.yaml data.path=DIR", "DIR"),
    Case("a pipe as rows", "mkfifo p.jsonl; fireopd train small.yaml data.path=p.jsonl", "p.jsonl"),
    Case(
        "a device as rows",
        "ln -s /dev/zero z.jsonl; fireopd train small.yaml data.path=z.jsonl",
        "z.jsonl",
    ),
    Case(
        "a loop of links as rows",
        "ln -s a.jsonl b.jsonl; ln -s b.jsonl a.jsonl; fireopd train small.yaml data.path=a.jsonl",
        "a.jsonl",
    ),
    Case(
        "a folder that holds itself",
        "mkdir d; ln -s ../d d/d; fireopd train small.yaml data.path=d",
        "d",
    ),
    Case(
        "gzip of 2 GB of zeros",
        "head -c 2G /dev/zero | gzip -1 > bomb.jsonl.gz; "
        "fireopd train small.yaml data.path=bomb.jsonl.gz",
        "bomb.jsonl.gz",
    ),
    Case(
        "an address as rows",
        "fireopd train small.yaml data.path=https://example.com/rows.jsonl",
        "is an address",
    ),
    Case(
        "a bucket as rows",
        "fireopd train small.yaml data.path=s3://bucket/rows.jsonl",
        "is an address",
    ),
    Case(
        "a name of the hub without a network",
        "fireopd train small.yaml data.path=openai/gsm8k",
        "openai/gsm8k",
    ),
    Case(
        "a built-in task that does not exist",
        "fireopd train small.yaml data.path=builtin:adition-2",
        "builtin:addition",
    ),
    Case(
        "a built-in task of 10^9 digits",
        "fireopd train small.yaml data.path=builtin:addition-1000000000",
        "builtin:addition",
    ),
    Case(
        "a column that does not exist",
        "fireopd train small.yaml data.prompt_column=promt",
        "prompt",
    ),
    Case(
        "an answer's column that does not exist",
        "fireopd train small.yaml data.answer_column=anwser",
        "answer",
    ),
    Case(
        "weights that are all zero",
        "fireopd train small.yaml 'data.mixture=[{path: prompts.jsonl, weight: 0}]'",
        "weight",
    ),
    Case(
        "an unknown key of a source",
        "fireopd train small.yaml 'data.mixture=[{path: prompts.jsonl, wieght: 1}]'",
        "did you mean 'weight'",
    ),
    Case(
        "routes to a teacher that does not exist",
        "fireopd train small.yaml data.teacher_column=answer 'data.routes={\"*\": math}'",
        "math",
    ),
    Case(
        "a teacher's column without routes",
        "fireopd train small.yaml data.teacher_column=answer",
        "answer",
    ),
    Case(
        "`fireopd data` of a broken row",
        "fireopd data bad.jsonl",
        "bad.jsonl:2",
        {"bad.jsonl": GOOD + "{"},
    ),
    Case("`fireopd data` of nothing", "fireopd data", ""),
    Case(
        "`fireopd data` of a binary file",
        "printf '\\377%.0s' {1..50000} > x.jsonl; fireopd data x.jsonl",
        "x.jsonl",
    ),
)
