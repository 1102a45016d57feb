"""Prompts of a command: which files and columns, in the words of its options; what lines keep."""

import io
import json
import sys

import pytest
from typer.testing import CliRunner

from fireopd_jax.cli import app
from fireopd_jax.commands.generate import GenerateOptions, other_columns, with_clock
from fireopd_jax.commands.journal import lines_to
from fireopd_jax.commands.prompts import plain_ids, read_prompts
from fireopd_jax.config import UserError
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.session.specs import make_spec

QUESTIONS = [{"question": f"{i}+{i}?", "answer": f"work\n#### {2 * i}"} for i in (1, 2)]
TALK = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"}]  # fmt: skip


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(asked):
    return [each.prompt for each in asked]


@pytest.fixture
def standard_input(monkeypatch):
    def give(content, terminal=False):
        stream = io.TextIOWrapper(io.BytesIO(content.encode()))
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stream)

    return give


def test_columns_are_recognised_or_named(tmp_path):
    file = written(tmp_path / "gsm8k.jsonl", QUESTIONS)
    assert texts(read_prompts(file)) == ["1+1?", "2+2?"]
    assert texts(read_prompts(file, "answer")) == ["work\n#### 2", "work\n#### 4"]
    chats = written(tmp_path / "trl.jsonl", [{"messages": TALK}])
    (chat,) = read_prompts(chats)
    assert chat.prompt == TALK[:2] and chat.columns == {"messages": TALK}


def test_errors_name_the_options_of_the_command(tmp_path):
    file = written(tmp_path / "a.jsonl", QUESTIONS)
    other = written(tmp_path / "b.jsonl", [{"x": "1"}])
    for source, column, error in (
        (file, "qestion", r"no column 'qestion' \(--prompt-column\).*did you mean 'question'"),
        (other, None, r"name it as --prompt-column; the row has 'x'"),
        (str(tmp_path / "c.jsonl"), None, r"--prompts: no file"),
        (str(tmp_path / "c.xyz"), None, r"--prompts: .*unknown kind"),
        (str(tmp_path / "c.txt"), None, r"--prompts: .*cannot be read \(No such file"),
    ):
        with pytest.raises(UserError, match=error) as caught:
            read_prompts(source, column)
        assert "data." not in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_that_is_only_copied_may_hold_anything(tmp_path):
    file = written(tmp_path / "a.jsonl", [{"prompt": "x", "answer": {"a": [1]}, "reference": 2}])
    (asked,) = read_prompts(file)
    assert asked.columns["answer"] == {"a": [1]}


def test_a_text_has_a_prompt_on_each_line(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeff2+2\r\n\n  3+3 \n".encode())
    asked = read_prompts(str(file))
    assert texts(asked) == ["2+2", "3+3"] and asked[1].row.origin == f"{file}:3"
    with pytest.raises(UserError, match=r"--prompt-column q: .*t\.txt is plain text"):
        read_prompts(str(file), "q")
    file.write_text("\n \n")
    with pytest.raises(UserError, match=r"t\.txt: no prompt in it"):
        read_prompts(str(file))
    file.write_bytes(b"a\n\xff\n")
    with pytest.raises(UserError, match="not valid UTF-8"):
        read_prompts(str(file))
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"zero\.txt cannot be read \(not a file\)"):
        read_prompts(str(tmp_path / "zero.txt"))


def test_standard_input_is_json_or_lines(standard_input):
    standard_input('\n{"question": "1+1?"}\n')
    assert texts(read_prompts("-")) == ["1+1?"]
    standard_input("1+1?\n2+2?\n")
    asked = read_prompts("-")
    assert texts(asked) == ["1+1?", "2+2?"] and asked[1].row.origin == "standard input:2"
    standard_input('{"prompt": "a"}\n{"prompt": 7}\n')
    with pytest.raises(UserError, match=r"^standard input:2: column 'prompt'"):
        read_prompts("-")
    standard_input("", terminal=True)
    with pytest.raises(UserError, match="expected a file, or prompts on standard input"):
        read_prompts("-")


def test_standard_input_without_end_is_refused(standard_input, monkeypatch):
    monkeypatch.setattr("fireopd_jax.commands.prompts.LARGEST_PROMPTS", 8)
    standard_input("1+1?\n2+2?\n")
    with pytest.raises(UserError, match="--prompts: over 8 bytes on standard input"):
        read_prompts("-")


def test_other_columns_are_kept_and_none_is_lost(tmp_path):
    row = {"prompt": TALK[:2], "answer": 4, "text": "mine", "row_text": "too", "finish": None,
           "x": float("nan")}  # fmt: skip
    (asked,) = read_prompts(written(tmp_path / "a.jsonl", [row]))
    line = {"prompt": asked.prompt, "text": "ours", "finish": "stop"}
    assert line | other_columns(line, asked) == {
        **line, "answer": 4, "row_row_text": "mine", "row_text": "too", "row_finish": None,
        "x": "nan",
    }  # fmt: skip
    (named,) = read_prompts(written(tmp_path / "b.jsonl", [{"q": "a", "prompt": "b"}]), "q")
    line = {"prompt": named.prompt}
    assert line | other_columns(line, named) == {"prompt": "a", "q": "a", "row_prompt": "b"}


def test_lines_go_to_standard_output_in_order(capsys):
    with lines_to(None, {}, 3) as (done, write):
        assert done == set()
        for index in (2, 0):
            write(index, {"i": index})
        assert capsys.readouterr().out == '{"i": 0}\n'
        write(1, {"i": 1})
    assert capsys.readouterr().out == '{"i": 1}\n{"i": 2}\n'


def test_raw_prompts_may_begin_with_the_bos(tmp_path, capsys):
    from tests.text.test_chat_templates import KINDS

    KINDS["BOS and EOS"].save_pretrained(tmp_path / "bos")
    rows = [each.row for each in read_prompts(written(tmp_path / "p.jsonl", QUESTIONS))]
    spec = make_spec("model", ModelConfig(tokenizer=str(tmp_path / "bos")))
    whole = [spec.tokenizer(text["question"])["input_ids"][:-1] for text in QUESTIONS]
    assert plain_ids(spec, rows, bos=True) == whole
    assert plain_ids(spec, rows) == [ids[1:] for ids in whole]
    bare = make_spec("model", ModelConfig())
    assert plain_ids(bare, rows, bos=True) == plain_ids(bare, rows)
    assert "--bos adds nothing" in capsys.readouterr().err


def test_a_killed_command_goes_on_with_its_own_date(tmp_path, capsys):
    dated = "{{ strftime_now('%H:%M') }} {{ messages[0].content }}"
    spec = make_spec("model", ModelConfig(chat_template=dated))
    out = tmp_path / "out.jsonl"
    begun = with_clock(spec, {}, out)
    assert begun.keys() == {"strftime_now"} and begun["strftime_now"] in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), lines_to(out, {"clock": "2024-07-26T23:59:00"}, 2) as (
        _, write,
    ):  # fmt: skip
        write(1, {"text": "b"})
        raise KeyboardInterrupt
    assert with_clock(spec, {}, out) == {"strftime_now": "2024-07-26T23:59:00"}
    assert with_clock(make_spec("model", ModelConfig()), {}, out) == {}
    with lines_to(out, {"clock": "2024-07-26T23:59:00"}, 2) as (done, write):
        assert done == {1}
        write(0, {"text": "a"})
    assert out.read_text() == '{"text": "a"}\n{"text": "b"}\n'


def test_options_that_conflict_are_named():
    with pytest.raises(UserError, match="--bos goes with --raw"):
        GenerateOptions(bos=True).check()
    with pytest.raises(UserError, match="--chat-template chatml has no effect with --raw"):
        GenerateOptions(raw=True, chat_template="chatml").check()
    with pytest.raises(UserError, match="--stop: the text is empty"):
        GenerateOptions(stop=("a", "")).check()
    with pytest.raises(UserError, match="--stop: character 0 is an unpaired surrogate"):
        GenerateOptions(stop=("\udcff",)).check()


def test_the_command_says_at_once_that_it_starts(tmp_path):
    found = CliRunner().invoke(app, ["generate", "m", "--prompts", str(tmp_path / "none.jsonl")])
    assert found.stderr.startswith("fireopd: starting\n")
    assert isinstance(found.exception, UserError)
