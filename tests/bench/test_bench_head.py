"""The benchmark of the head: whole and well-formed; its times are nobody's test."""

import json
import sys

import pytest

from fireopd_jax import cli
from fireopd_jax.bench.head import Case

KEYS = {
    "implementation",
    "role",
    "pass",
    "seconds",
    "cpu_seconds",
    "scratch_mib",
    "ratio_to_naive_seconds",
    "ratio_to_naive_scratch",
    "ratio_to_matmul",
}
SMALL = ("--tokens", "8", "--width", "4", "--vocab", "64", "--top-k", "2", "--rounds", "2")


def call(monkeypatch, *arguments):
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "bench", "head", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_case_has_its_row(monkeypatch, capsys, tmp_path, dtype):
    file = tmp_path / "deep" / "head.json"
    arguments = ("--dtype", dtype, "--implementations", "chunked", "--chunk", "16")
    assert call(monkeypatch, *SMALL, *arguments, "--json", str(file)) == 0
    assert [path.name for path in file.parent.iterdir()] == ["head.json"]
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["rounds"] == 2 and result["matmul_seconds"] > 0
    assert all(set(row) == KEYS for row in result["rows"])
    assert {(row["implementation"], row["role"], row["pass"]) for row in result["rows"]} == {
        (name, *case)
        for name in ("reference", "chunked")
        for case in (
            ("teacher", "forward"),
            ("student", "forward"),
            ("student", "forward_backward"),
        )
    }
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["scratch_mib"] > 0
        if row["implementation"] == "reference":
            assert row["ratio_to_naive_seconds"] == row["ratio_to_naive_scratch"] == 1.0
    assert "chunked" in capsys.readouterr().out


def test_scratch_does_not_grow_with_the_vocabulary(monkeypatch, tmp_path):
    scratch = []
    for vocabulary in ("256", "1024"):
        file = tmp_path / f"{vocabulary}.json"
        shape = ("--tokens", "32", "--width", "4", "--vocab", vocabulary, "--top-k", "2")
        options = ("--rounds", "1", "--chunk", "64", "--json", str(file))
        assert call(monkeypatch, *shape, *options) == 0
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        scratch.append(
            {(r["implementation"], r["role"], r["pass"]): r["scratch_mib"] for r in rows}
        )
    for (name, *_), small in scratch[0].items():
        grown = scratch[1][(name, *_)] / small
        assert grown > 3 if name == "reference" else grown < 1.1


def test_a_round_waits_for_the_end():
    case = Case(lambda: sum(range(1000)), 0)
    case.round()
    case.round()
    assert len(case.wall_s) == len(case.cpu_s) == 2 and min(case.wall_s) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--implementations", "chunkd"), "unknown 'chunkd' (did you mean 'chunked'?)"),
        (("--dtype", "float8"), "--dtype: expected bfloat16 or float32, got 'float8'"),
        (("--top-k", "129"), "--top-k: expected 1 to 128, got 129"),
        (("--tokens", "0"), "--tokens: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, words):
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fireopd: ") and error.count("\n") == 1 and words in error
