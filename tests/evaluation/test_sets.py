"""Evaluation sets: chosen problems, duplicates, overlap with the training rows, wrong files."""

import json

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.sources import DataConfig, read_rows
from fireopd_jax.evaluation.sets import named_paths, read_set


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file, **options):
    return read_set("s", DataConfig(path=str(file)), **options)


def test_the_problems_are_chosen_by_hash_and_stay_in_order(tmp_path):
    rows = [{"prompt": f"{i}+1", "answer": i + 1} for i in range(20)]
    chosen = [row.prompt for row in read(write(tmp_path / "a.jsonl", rows), limit=5).rows]
    again = [row.prompt for row in read(write(tmp_path / "b.jsonl", rows[::-1]), limit=5).rows]
    assert len(chosen) == 5 and chosen == again[::-1]
    assert chosen == sorted(chosen, key=lambda p: int(p[0]["content"].partition("+")[0]))
    assert len(read(tmp_path / "a.jsonl", limit=99).rows) == 20


def test_duplicates_are_counted_and_other_answers_named(tmp_path):
    rows = [{"prompt": p, "answer": a} for p, a in (("a", 1), ("b", 2), ("a", 1), ("b", 3))]
    notes = list(read(write(tmp_path / "a.jsonl", rows)).notes("math"))
    assert "prompt=prompt, answer=answer" in notes[0]
    assert notes[1].startswith("s: 4 problems, 2 questions (")
    assert "a.jsonl:3 has the prompt of" in notes[1]
    assert "1 problems have the prompt of another and a different answer" in notes[2]
    assert "a.jsonl:4 has '3'" in notes[2] and "a.jsonl:2 has '2'" in notes[2]
    assert list(read(write(tmp_path / "b.jsonl", rows[:2])).notes("math"))[1:] == ["s: 2 problems"]


def test_answers_that_no_response_can_match_are_named(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "\\boxed{}"}]
    *_, note = read(write(tmp_path / "a.jsonl", rows)).notes("math")
    assert note.startswith("s: warning: 1 answers that no response can match") and ":2" in note


def test_problems_that_are_trained_on_are_counted(tmp_path):
    rows = [{"prompt": p, "answer": 1} for p in "abcd"]
    trained = read_rows(DataConfig(path=str(write(tmp_path / "t.jsonl", rows[1:3]))))
    own = read(write(tmp_path / "a.jsonl", rows))
    (note,) = own.overlap(trained)
    assert "2 of 4 problems are trained on" in note
    assert "a.jsonl:2 has the prompt of" in note and "t.jsonl:1" in note
    assert list(own.overlap([])) == []


@pytest.mark.parametrize(
    "rows, words",
    [
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}],
            r"a\.jsonl:2: no answer",
        ),
        ([{"prompt": "a", "answer": " "}], r"a\.jsonl:1: no answer"),
        ([{"prompt": "a"}], r"a\.jsonl:1: no answer"),
        ([], r"a\.jsonl: the file holds no rows"),
    ],
)
def test_a_set_without_answers_or_rows_is_refused(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path / "a.jsonl", rows))


def test_sets_are_named_by_their_files_or_by_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_paths(["data/gsm8k test.jsonl.gz", "m=a/b.parquet", "builtin:addition-2"]) == {
        "gsm8k_test": "data/gsm8k test.jsonl.gz",
        "m": "a/b.parquet",
        "builtin_addition-2": "builtin:addition-2",
    }
    assert list(named_paths(["a/x=1/b.jsonl"])) == ["b"]
    write(tmp_path / "x=1.jsonl", [])
    assert named_paths(["x=1.jsonl"]) == {"x_1": "x=1.jsonl"}
    with pytest.raises(UserError, match=r"--set b/m\.jsonl: a set 'm' is given twice"):
        named_paths(["a/m.jsonl", "b/m.jsonl"])
    for name in ("held_out", "a b", ""):
        with pytest.raises(UserError, match="--set"):
            named_paths([f"{name}=b.jsonl", "b.jsonl"])
