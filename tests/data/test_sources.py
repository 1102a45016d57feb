import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter, ValidationError

from fireopd_jax.config import UserError
from fireopd_jax.data.sources import DataConfig, Row, read_rows, route


def jsonl(folder, *records, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def row(teacher=None):
    prompt = ({"role": "user", "content": "x"},)
    return Row(prompt, answer=None, reference=None, teacher=teacher, origin="f:7")


def test_json_lines(tmp_path):
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": None},
        {"role": "assistant", "content": "a"},
    ]
    path = jsonl(
        tmp_path,
        {"prompt": "1+1", "answer": 2, "reference": "r", "privileged": "p", "other": [1]},
        {"prompt": chat, "answer": None},
    )
    first, second = read_rows(DataConfig(path=path))
    assert first == Row(
        prompt=({"role": "user", "content": "1+1"},),
        answer="2",
        reference="r",
        teacher=None,
        origin=f"{path}:1",
        privileged="p",
    )
    assert second.prompt == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
    )
    assert (second.answer, second.reference, second.origin) == (None, None, f"{path}:2")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\r\n\n{"prompt": "b"}')
    rows = read_rows(DataConfig(path=str(file)))
    assert [row.prompt[0]["content"] for row in rows] == ["é", "b"]
    assert rows[1].origin == f"{file}:3"


def test_parquet(tmp_path):
    path = str(tmp_path / "rows.parquet")
    prompts = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]] * 2
    table = pyarrow.table({"chat": prompts, "gold": [18.0, None, float("nan"), 0.5]})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    rows = read_rows(DataConfig(path=path, prompt_column="chat", answer_column="gold"))
    assert [row.answer for row in rows] == ["18", None, None, "0.5"]
    assert rows[3].prompt == ({"role": "user", "content": "b"},)
    assert rows[3].origin == f"{path}:4"


def test_sources_are_joined(tmp_path):
    path = jsonl(tmp_path, {"prompt": "hi", "domain": "greeting"})
    config = TypeAdapter(DataConfig).validate_python(
        {"path": [path, "builtin:subtraction-1"], "teacher_column": "domain"}
    )
    rows = read_rows(config)
    assert len(rows) == 56
    assert [row.teacher for row in rows[:2]] == ["greeting", "subtraction"]
    assert rows[1].origin == "builtin:subtraction-1:1"
    assert rows[1].reference is not None
    with pytest.raises(UserError, match="list is empty"):
        read_rows(DataConfig(path=()))


def test_the_default_is_the_built_in_task():
    rows = read_rows(DataConfig())
    assert len(rows) == 10_000
    assert rows[0].answer is not None
    assert rows[0].teacher is None


def test_named_columns_must_exist(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a", "gold": "1"}, {"prompt": "b"})
    assert [row.answer for row in read_rows(DataConfig(path=path))] == [None, None]
    for key in ("answer", "reference", "privileged", "teacher"):
        with pytest.raises(UserError, match=rf"rows.jsonl:2: no column 'gold' \(data.{key}_c"):
            read_rows(DataConfig(path=path, **{f"{key}_column": "gold"}))
    with pytest.raises(UserError, match=r"has 'prompt', 'gold' \(did you mean 'prompt'"):
        read_rows(DataConfig(path=path, prompt_column="promt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "malformed JSON at column 15"),
        (b"[" * 100_000, "malformed JSON: "),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "malformed JSON: "),
        (b'["prompt"]', "expected an object of columns, found a list"),
        (b'{"prompt": "\xff"}', "not valid UTF-8 at byte 12 of the line"),
        (b'{"prompt": "\\ud800"}', "character 0 is an unpaired surrogate"),
        (b'{"question": "a"}', "no column 'prompt' .*the row has 'question'"),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'{"prompt": []}', "the prompt is empty"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}]}', "the prompt is empty"),
        (b'{"prompt": null}', "expected a text or a list of messages, found null"),
        (b'{"prompt": {"role": "user"}}', "list of messages, found an object"),
        (b'{"prompt": ["a"]}', "message 1: expected an object, found a text"),
        (b'{"prompt": [{"role": "user"}]}', "message 1: expected a text content, found none"),
        (b'{"prompt": [{"role": 1, "content": "a"}]}', "expected a text role, found a number"),
        (b'{"prompt": [{"role": "user", "content": []}]}', "text content, found a list"),
        (b'{"prompt": "a", "answer": true}', "'answer': expected a text .* found true or false"),
        (b'{"prompt": "a", "reference": {}}', "'reference': expected a text .* found an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}") as caught:
        read_rows(DataConfig(path=str(file)))
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    jsonl(tmp_path, {"prompt": "a"}, name="train.jsonl")
    with pytest.raises(UserError, match=r"no file '.*' \(did you mean 'train.jsonl'"):
        read_rows(DataConfig(path=str(tmp_path / "tain.jsonl")))
    with pytest.raises(UserError, match="no file"):
        read_rows(DataConfig(path=str(tmp_path / "absent" / "train.jsonl")))
    with pytest.raises(UserError, match="is an address; download it"):
        read_rows(DataConfig(path="https://example.com/train.jsonl"))
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"a\.zip' is of an unknown kind.*builtin:TASK$"):
        read_rows(DataConfig(path=str(tmp_path / "a.zip")))
    with pytest.raises(UserError, match=r"expected \.jsonl, .*, OWNER/NAME .*builtin:TASK"):
        read_rows(DataConfig(path=str(tmp_path / "train.xlsx")))
    with pytest.raises(UserError, match="did you mean 'builtin:addition-2'"):
        read_rows(DataConfig(path="addition-2"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: the file holds no rows"):
        read_rows(DataConfig(path=str(tmp_path / "empty.jsonl")))
    (tmp_path / "broken.parquet").write_text("PAR1 it is not")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read as Parquet"):
        read_rows(DataConfig(path=str(tmp_path / "broken.parquet")))


def test_the_configuration_is_checked():
    with pytest.raises(ValidationError):
        DataConfig(max_prompt_tokens=0)
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python({"overlong": "cut"})
    fields = TypeAdapter(DataConfig).json_schema()["properties"]
    assert all(field["description"] for field in fields.values())


def test_routes_are_the_indices_of_the_teachers():
    rows = [row("math"), row("code"), row("math")]
    routes = route(rows, ["code", "math"], "domain")
    assert routes.dtype == np.int32
    assert routes.tolist() == [1, 0, 1]
    assert route([row()] * 3, ["only"], None).tolist() == [0, 0, 0]


def test_unknown_teachers_are_named():
    with pytest.raises(UserError, match=r"f:7: .*'maths'; known are code, math \(did you .*'math'"):
        route([row("math"), row("maths")], ["code", "math"], "domain")
    with pytest.raises(UserError, match="names an unknown teacher: null"):
        route([row()], ["code"], "domain")
    with pytest.raises(UserError, match=r"data\.teacher_column: 2 teachers"):
        route([row()], ["code", "math"], None)
