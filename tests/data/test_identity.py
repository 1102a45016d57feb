"""A run's rows are those of their content, wherever the command stands."""

import dataclasses

import pytest

from fireopd_jax.config import UserError, validate
from fireopd_jax.data.identity import check_rows, identity, located, rows_digest
from fireopd_jax.data.rows import Row
from fireopd_jax.data.settings import DataConfig


def row(text, **fields):
    return Row(({"role": "user", "content": text},), "1", None, None, origin="f:1", **fields)


def test_the_digest_is_that_of_the_content():
    rows = [row("a"), row("b")]
    moved = [dataclasses.replace(each, origin="g:7") for each in rows]
    assert rows_digest(rows) == rows_digest(moved)
    for other in (
        rows[::-1],
        rows[:1],
        [row("a"), dataclasses.replace(row("b"), answer="2")],
        [row("a"), dataclasses.replace(row("b"), reference="r")],
        [row("a"), row("b", privileged="p")],
        [row("a"), row("b", begun="x")],
        [row("a"), row("b", tools=({"name": "t"},))],
    ):
        assert rows_digest(other) != rows_digest(rows)


def test_other_rows_are_refused(tmp_path):
    recorded = identity([row("a"), row("b")], tmp_path)
    check_rows([row("a"), row("b")], recorded, tmp_path)
    with pytest.raises(UserError, match=r"these 1 rows are not those of .*, which read 2 rows in"):
        check_rows([row("a")], recorded, tmp_path)


def test_paths_are_found_where_the_run_was_started(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}")
    paths = ["rows/a.jsonl", "rows/*.jsonl", "rows", "none.jsonl", "builtin:addition-1", "o/gsm8k"]
    expected = [f"{tmp_path}/{path}" for path in paths[:3]] + paths[3:]
    assert located(DataConfig(path=tuple(paths)), tmp_path).path == tuple(expected)
    assert located(DataConfig(path="rows/a.jsonl"), tmp_path).path == f"{tmp_path}/rows/a.jsonl"
    mixture = [{"path": "rows/a.jsonl", "weight": 2, "teacher": "t"}, {"path": "o/gsm8k"}]
    first, second = located(validate(DataConfig, {"mixture": mixture}, {}), tmp_path).mixture
    assert (first.path, first.weight, first.teacher) == (f"{tmp_path}/rows/a.jsonl", 2, "t")
    assert second.path == "o/gsm8k"
