"""The benchmark of attention: complete and well-formed output; times are not tested."""

import json
import sys

import pytest

from fireopd_jax import cli
from fireopd_jax.bench import attention as bench

KEYS = {"implementation", "pass", "tokens", "seconds", "cpu_seconds", "scratch_mib"}


def call(monkeypatch, *arguments):
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "bench", "attention", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_every_length_has_its_rows_and_the_largest_is_not_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "LARGEST_SCRATCH", 48 * 2**20)
    file = tmp_path / "attention.json"
    arguments = ("--tokens-max", "1100", "--rounds", "1", "--json", str(file))
    assert call(monkeypatch, *arguments) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["rounds"] == 1 and {"device", "platform", "jax", "shape"} < set(result)
    assert all(set(row) == KEYS for row in result["rows"])
    assert {(row["implementation"], row["pass"], row["tokens"]) for row in result["rows"]} == {
        (name, pass_name, tokens)
        for name in ("reference", "chunked")
        for pass_name in ("forward", "forward_backward")
        for tokens in (512, 1024)
    }
    for row in result["rows"]:
        assert (row["seconds"] is None) == (row["scratch_mib"] > 48)
        assert row["scratch_mib"] > 0
    assert "reference: compiled, not run from 1024 tokens on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens-max", "100"), "--tokens-max: expected at least 512, got 100"),
        (("--rounds", "0"), "--rounds: expected at least 1, got 0"),
        (("--dtype", "float8"), "--dtype: expected bfloat16 or float32, got 'float8'"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, words):
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fireopd: ") and error.count("\n") == 1 and words in error
