"""What a stranger has written is read within bounds."""

import json
import os

import pytest
import yaml

from fireopd_jax.runtime.limits import (
    TooLong,
    TooMuch,
    at_most,
    parse_json,
    read_json,
    read_text,
    read_yaml,
)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases multiply"),
        ("a: &a [*a]", "nested"),
        ("[" * 100_000, "nested"),
        ("{a: " * 5_000 + "}" * 5_000, "nested"),
        ("a: " + "x" * 5_000_000, "characters"),
        ("a: " + "9" * 5_000, "digits"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("{[a]: 1}", "hashable"),
    ],
    ids=["laughs", "cycle", "lists", "maps", "size", "digits", "python", "key"],
)
def test_yaml_without_bounds_is_no_yaml(text, words):
    with pytest.raises(yaml.YAMLError, match=words):
        read_yaml(text)


def test_yaml_within_bounds_is_read():
    node, value = read_yaml("a: &a {b: 1e-6}\nc: *a\n")
    assert value == {"a": {"b": 1e-6}, "c": {"b": 1e-6}} and node is not None
    assert read_yaml("") == (None, None)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[" * 100_000, "nested"), (b"{", "Expecting"), (b"\xff", "utf-8"), (b"9" * 9999, "digits")],
)
def test_json_without_bounds_is_no_json(tmp_path, content, words):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_json(file)


def test_only_files_are_read_as_json(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        for read in (read_json, read_text):
            with pytest.raises(ValueError, match="not a file"):
                read(type(tmp_path)(path))
    (tmp_path / "a.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_text_is_read_within_bounds(tmp_path):
    file = tmp_path / "a.jinja"
    file.write_text("{{ é }}", encoding="utf-8")
    assert read_text(file) == "{{ é }}"
    with pytest.raises(ValueError, match="at most 4 bytes"):
        read_text(file, 4)


@pytest.mark.parametrize("text", ["[" * 100_000, b'{"a":' * 100_000, "{", "9" * 5_000])
def test_json_that_is_none_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_code_that_takes_all_memory_is_ended():
    with pytest.raises(TooMuch), at_most(60.0, 2.0**26):
        kept = []
        while True:
            kept.append(bytearray(b"x" * 2**20))


def test_code_that_does_not_end_is_ended():
    with pytest.raises(TooLong), at_most(0.01):
        while True:
            pass
    with at_most(60.0):
        found = sum(range(10))
    assert found == 45
