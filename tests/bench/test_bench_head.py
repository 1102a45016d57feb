"""The benchmark of the head: complete and well-formed output; times are not tested."""

import json
import sys

import pytest

from fireopd_jax import cli
from fireopd_jax.bench import head as bench
from fireopd_jax.bench.head import Case, Shape
from fireopd_jax.ops import pallas_tpu

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


def find(result, *key):
    keys = ("implementation", "role", "pass")
    return next(row for row in result["rows"] if tuple(row[name] for name in keys) == key)


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
        naive = find(result, "reference", row["role"], row["pass"])["seconds"]
        assert row["ratio_to_naive_seconds"] == row["seconds"] / naive
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


def test_the_default_is_all_that_runs_here(monkeypatch, capsys):
    def reason(tokens, width, vocabulary, support, k, dtype):
        return f"not this K, {k}" if k else None

    shape = Shape(8, 4, 64, 2, "float32")
    assert bench.choose(shape, None) == ["reference", "chunked"]
    monkeypatch.setitem(bench.PLATFORMS, "pallas_tpu", "cpu")
    assert bench.choose(shape, None) == ["reference", "chunked", "pallas_tpu"]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(pallas_tpu, "unsupported_reason", reason)
    assert bench.choose(shape, None) == ["reference", "chunked"]
    assert capsys.readouterr().out == "pallas_tpu is left out: not this K, 2\n"


@pytest.mark.parametrize("mode", [(), ("--tune",)])
@pytest.mark.parametrize("width", ["4", "100000"])
def test_a_kernel_that_cannot_run_is_one_line(monkeypatch, capsys, tmp_path, width, mode):
    monkeypatch.chdir(tmp_path)
    if width != "4":
        monkeypatch.setitem(bench.PLATFORMS, "pallas_tpu", "cpu")
    shape = ("--tokens", "1", "--width", width, "--vocab", "8", "--top-k", "1")
    assert call(monkeypatch, *shape, "--implementations", "chunked,pallas_tpu", *mode) == 2
    error = capsys.readouterr().err
    assert error == "fireopd: --implementations: pallas_tpu " + (
        "runs on TPU only, this machine has CPU; here run: reference, chunked\n"
        if width == "4"
        else "does not support this: width 100000 in float32 is too wide for blocks of 44 MiB\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--implementations", "chunkd"), "unknown 'chunkd' (did you mean 'chunked'?)"),
        (("--dtype", "float8"), "--dtype: expected bfloat16 or float32, got 'float8'"),
        (("--top-k", "129"), "--top-k: expected 1 to 128, got 129"),
        (("--tokens", "0"), "--tokens: expected at least 1, got 0"),
        (("--chunk", "0"), "--chunk: expected at least 1, got 0"),
        (("--implementations", "pallas_gpu_rows"), "pallas_gpu_rows runs on GPU only"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, words):
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fireopd: ") and error.count("\n") == 1 and words in error
