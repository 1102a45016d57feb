"""Conversations of OpenAI, TRL and ShareGPT: no turn, tool or call is lost without a word."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import render
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_data, read_rows
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer

USER = {"role": "user", "content": "weather?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "T1"}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "12 C"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SPOKEN = {"role": "assistant", "content": "It is 12 C."}


def write(folder, *records, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def one(folder, record, **keys):
    (row,) = read_rows(DataConfig(path=write(folder, record), **keys))
    return row


def test_tools_and_calls_are_kept(tmp_path):
    row = one(tmp_path, {"prompt": [USER, CALLING, ANSWERED], "tools": [TOOL]})
    assert row.prompt == (USER, {**CALLING, "content": ""}, ANSWERED)
    assert row.tools == (TOOL,)
    assert one(tmp_path, {"prompt": [USER], "tools": json.dumps([TOOL])}).tools == (TOOL,)
    for none in (None, [], ""):
        assert one(tmp_path, {"prompt": [USER], "tools": none}).tools is None
    row = one(tmp_path, {"prompt": [USER], "functions": [TOOL]}, tools_column="functions")
    assert row.tools == (TOOL,)


def test_arguments_stored_as_json_text_become_objects(tmp_path):
    stored = {"id": "c1", "function": {"name": "weather", "arguments": '{"town": "T1"}'}}
    calling = {"role": "assistant", "tool_calls": [stored]}
    row = one(tmp_path, {"messages": [USER, calling, ANSWERED]})
    assert row.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"town": "T1"}
    legacy = {"role": "assistant", "content": None, "function_call": stored["function"]}
    row = one(tmp_path, {"messages": [USER, legacy, ANSWERED]})
    assert row.prompt[1]["tool_calls"] == [CALL]


def test_content_in_parts_is_joined(tmp_path):
    parts = [{"type": "text", "text": "wea"}, {"type": "input_text", "text": "ther"}, "?"]
    row = one(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert row.prompt == (USER,)
    image = [{"type": "image_url", "image_url": {"url": "u"}}]
    with pytest.raises(UserError, match=r":1: .*message 1: part 1: .*text, found 'image_url'"):
        one(tmp_path, {"messages": [{"role": "user", "content": image}]})


def test_columns_of_parquet_do_not_add_keys_to_messages(tmp_path):
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    table = pyarrow.Table.from_pylist(
        [
            {"prompt": [USER, CALLING, ANSWERED], "tools": [TOOL]},
            {"prompt": [USER, {**CALLING, "tool_calls": [other]}, ANSWERED], "tools": None},
        ]
    )
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(table, path)
    first, second = read_rows(DataConfig(path=path))
    assert first.prompt == (USER, {**CALLING, "content": ""}, ANSWERED)
    assert second.prompt[1]["tool_calls"] == [other]
    assert second.tools is None


def test_sharegpt_with_calls(tmp_path):
    call = {"name": "weather", "arguments": {"town": "T1"}}
    said = [
        ("system", "s"), ("human", "weather?"), ("function_call", json.dumps(call)),
        ("observation", "12 C"), ("gpt", "It is 12 C."),
    ]  # fmt: skip
    row = one(tmp_path, {"conversations": [{"from": f, "value": v} for f, v in said]})
    assert [turn["role"] for turn in row.prompt] == ["system", "user", "assistant", "tool"]
    assert row.prompt[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert row.reference == "It is 12 C."


def test_messages_stored_as_json_text(tmp_path):
    row = one(tmp_path, {"messages": json.dumps([USER, SPOKEN])})
    assert (row.prompt, row.reference) == ((USER,), SPOKEN["content"])
    for text in ('[{"a": 1}]', "[{not json", "[1, 2]", "[]"):
        assert one(tmp_path, {"prompt": text}).prompt == ({"role": "user", "content": text},)


def test_the_last_turn_of_messages_is_the_reference(tmp_path):
    record = {"messages": [USER, SPOKEN, {"role": "user", "content": "and now?"}, SPOKEN]}
    data = read_data(DataConfig(path=write(tmp_path, record, {"messages": [USER]})))
    first, second = data.rows
    assert first.prompt == tuple(record["messages"][:3])
    assert (first.reference, second.reference) == ("It is 12 C.", None)
    assert list(data.notes())[1].endswith("1 conversations: the last turn is the reference")


def test_the_last_turn_of_a_prompt_begins_the_response(tmp_path):
    record = {"prompt": [USER, {"role": "assistant", "content": "It is "}], "completion": "12 C."}
    data = read_data(DataConfig(path=write(tmp_path, record, {"prompt": [USER]})))
    row, plain = data.rows
    assert (row.prompt, row.begun, row.reference) == ((USER,), "It is ", "12 C.")
    assert "1 conversations: the last turn begins the response" in list(data.notes())[1]
    tokenizer = load_tokenizer(BUILTIN)
    ids, others = render(tokenizer, [row, plain], {})
    assert ids.tolist() == [*others.tolist(), *b"It is "]
    row = one(tmp_path, record | {"completion": None}, last_turn="reference")
    assert (row.begun, row.reference) == ("", "It is ")
    row = one(tmp_path, {"messages": record["prompt"]}, last_turn="prefill")
    assert (row.begun, row.reference) == ("It is ", None)


def test_what_cannot_be_a_reference_or_a_beginning_is_said(tmp_path):
    thinking = {"role": "assistant", "content": "12", "reasoning_content": "hm"}
    path = write(tmp_path, {"messages": [USER, CALLING]}, {"messages": [USER, thinking]})
    data = read_data(DataConfig(path=path))
    assert [row.reference for row in data.rows] == [None, "12"]
    notes = "\n".join(data.notes())
    assert "1 conversations: the last turn calls tools, which is no reference" in notes
    assert "1 conversations: the reasoning of the last turn is not used" in notes
    with pytest.raises(UserError, match=r":1: .*the last turn calls a tool, .*data\.last_turn="):
        one(tmp_path, {"prompt": [USER, CALLING]})
    path = write(tmp_path, {"messages": [USER, SPOKEN], "reference": "r"})
    data = read_data(DataConfig(path=path))
    assert data.rows[0].reference == "r"
    assert "the last turn is not used, the reference has a column" in list(data.notes())[1]


def test_turns_of_a_completion_before_its_last_belong_to_the_prompt(tmp_path):
    row = one(tmp_path, {"prompt": [USER], "completion": [CALLING, ANSWERED, SPOKEN]})
    assert [turn["role"] for turn in row.prompt] == ["user", "assistant", "tool"]
    assert row.reference == "It is 12 C."
    with pytest.raises(UserError, match="'completion': expected messages that end with an assist"):
        one(tmp_path, {"prompt": [USER], "completion": [USER]})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": None}, USER], "message 1: .* content, found null"),
        ([USER, {"role": "assistant", "tool_calls": 1}], "tool_calls: .* list of calls, found a n"),
        (
            [USER, {"role": "assistant", "tool_calls": "x"}],
            "tool_calls: expected a list",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": "[" * 100_000}],
            "tool_calls: .* as JSON: nested too deeply",
        ),
        ([{"from": "human"}], "expected texts from and value, found a text and null"),
        ([{"from": "function_call", "value": "x"}], "expected a call or a list of calls as JSON"),
        ([{"role": "user", "content": "\ud800"}], "unpaired surrogate"),
    ],
)
def test_a_broken_message_is_named(tmp_path, messages, message):
    with pytest.raises(
        UserError, match=rf"rows\.jsonl:1: column 'messages': .*{message}"
    ) as caught:
        one(tmp_path, {"messages": messages})
    assert "\n" not in str(caught.value)
