"""The table of block sizes: complete, and existing entries are kept."""

import copy
import json
import sys

import pytest

from fireopd_jax import cli
from fireopd_jax.bench import tune
from fireopd_jax.bench.head import PLATFORMS, Shape
from fireopd_jax.ops.blocks import Blocks

SMALL = ("--tune", "--tokens", "8", "--width", "4", "--vocab", "64", "--top-k", "2", "--rounds")
OF_SMALL = {"tokens": 8, "width": 4, "vocabulary": 64, "k": 2, "dtype": "float32"}
CASES = [("teacher", "forward"), ("student", "forward_backward")]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tune, "CHUNKS", (16, 32, 128))


def call(monkeypatch, *arguments):
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "bench", "head", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_chunk_has_its_row_and_the_usual_one_is_marked(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *SMALL, "2") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["head_blocks.json"]
    table = read(tmp_path / "head_blocks.json")
    (entry,) = table["device kinds"].values()
    assert list(table) == ["device kinds"] and list(table["device kinds"]) == ["cpu"]
    assert set(entry) == {"jax", "rows"}
    for role, pass_name in CASES:
        rows = [row for row in entry["rows"] if row["role"] == role]
        # Chunks beyond the vocabulary are the vocabulary.
        assert sorted(row["chunk"] for row in rows) == [16, 32, 64]
        assert [row["chunk"] for row in rows if row["default"]] == [64]
        assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
        for row in rows:
            assert row["implementation"] == "chunked" and row["pass"] == pass_name
            assert row["shape"] == OF_SMALL
            assert row["seconds"] > 0 and row["scratch_mib"] > 0
    printed = capsys.readouterr().out
    assert "chunk=16" in printed and "wrote head_blocks.json" in printed


def test_rows_of_other_devices_and_shapes_are_kept(monkeypatch, tmp_path):
    file = tmp_path / "table.json"
    arguments = (*SMALL, "1", "--json", str(file))
    assert call(monkeypatch, *arguments) == 0
    table = read(file)
    other = copy.deepcopy(table["device kinds"]["cpu"])
    other["rows"][0]["seconds"] = 7.0
    table["device kinds"]["TPU v5e"] = other
    wider = {**other["rows"][0], "shape": {**OF_SMALL, "vocabulary": 65}}
    stale = {**other["rows"][0], "chunk": 3}
    kernel = {**other["rows"][0], "implementation": "pallas_tpu"}
    table["device kinds"]["cpu"]["rows"] += [wider, stale, kernel]
    table["note"] = "of mine"
    file.write_text(json.dumps(table), encoding="utf-8")
    assert call(monkeypatch, *arguments) == 0
    after = read(file)
    assert after["note"] == "of mine" and after["device kinds"]["TPU v5e"] == other
    rows = after["device kinds"]["cpu"]["rows"]
    assert wider in rows and kernel in rows and stale not in rows and len(rows) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": []}', '{"device kinds": {"cpu": {"rows": [1]}}}', "\\x00"]
)
def test_another_file_is_refused_and_left_alone(monkeypatch, capsys, tmp_path, text):
    file = tmp_path / "head.json"
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(tune, "prepare", None)
    assert call(monkeypatch, *SMALL, "1", "--json", str(file)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fireopd: {file}: expected a table") and error.count("\n") == 1
    assert file.read_text(encoding="utf-8") == text


def test_a_file_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tune, "CHUNKS", ())
    (tmp_path / "taken.part").mkdir()
    assert call(monkeypatch, *SMALL, "1", "--json", str(tmp_path / "taken")) == 2
    error = capsys.readouterr().err
    assert "taken: cannot be written: " in error and error.count("\n") == 1


def test_sizes_that_do_not_compile_are_listed_with_the_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(PLATFORMS, "pallas_tpu", "cpu")
    file = tmp_path / "table.json"
    assert call(monkeypatch, *SMALL, "1", "--json", str(file)) == 0
    names = {row["implementation"] for row in read(file)["device kinds"]["cpu"]["rows"]}
    assert names == {"chunked"}
    cells = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    printed = " ".join(cell[-2].strip() for cell in cells)
    # The smallest block halved is none; the whole ones lack the hardware.
    assert "blocks.tokens must be a multiple of 128, got 64" in printed
    assert "interpret mode" in printed
    file.unlink()
    arguments = ("--implementations", "pallas_tpu", "--json", str(file))
    assert call(monkeypatch, *SMALL, "1", *arguments) == 2
    assert "none of these sizes compiled" in capsys.readouterr().err and not file.exists()


def test_candidates_lie_around_the_formula():
    shape = Shape(2048, 4096, 151936, 16, "bfloat16")
    own, *others = tune.candidates(shape, "pallas_tpu", "teacher")
    assert own == Blocks(1024, 512, 1024)
    assert len(set(others)) == 8 and Blocks(2048, 512, 1024) in others
    assert Blocks(512, 1024, 1024) in others and Blocks(1024, 512, 512) in others
    own, *others = tune.candidates(shape, "pallas_gpu", "teacher")
    assert own == Blocks(128, 256, 64)
    assert others == [Blocks(128, columns, 64) for columns in (64, 128, 192)]
    many = Shape(2048, 4096, 151936, 128, "bfloat16")
    defaults = [tune.candidates(many, "pallas_gpu", role)[0] for role in ("teacher", "student")]
    assert defaults == [Blocks(128, 128, 64), Blocks(128, 256, 64)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--chunk", "16"), "--chunk: has no effect with --tune"),
        (("--implementations", "reference"), "reference has no block sizes to measure"),
        (("--implementations", "pallas_gpu"), "pallas_gpu runs on GPU only"),
        (("--top-k", "129"), "--top-k: expected 1 to 128, got 129"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *SMALL, "1", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fireopd: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())
