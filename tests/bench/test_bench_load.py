"""The benchmark of loading: complete and well-formed output; times are not tested."""

import json

import jax
import pytest

from fireopd_jax.bench import load as bench
from fireopd_jax.bench.load import bench_load, measure, measure_in_process, programs, write_random
from fireopd_jax.config import UserError
from fireopd_jax.models.hf_load import open_folder, read_config

ROWS = {"file_bytes", "parameter_bytes", "read_seconds", "keep_seconds", "load_seconds",
        "extra_bytes"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "m"
    path.mkdir()
    write_random(path, 0.0005)
    return path


def test_random_weights_are_of_the_size_asked_for(folder):
    assert len(list(folder.glob("*.safetensors"))) >= bench.SHARDS
    assert read_config(folder).dtype == "bfloat16"
    size = sum(tensor.bytes for tensor in open_folder(folder).values())
    assert 0.6 < size / (0.0005 * 2**30) < 1.6


@pytest.mark.parametrize(("kept", "factor"), [(None, 1), ("float32", 2)])
def test_a_load_is_measured(folder, kept, factor):
    row = measure(folder, kept)
    assert row.keys() == ROWS and all(value >= 0 for value in row.values())
    assert row["parameter_bytes"] == factor * row["file_bytes"] > 0
    assert min(row[key] for key in ROWS if "seconds" in key) > 0


def test_the_whole_is_printed_and_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_in_process", measure)
    depths = []

    def quick(depth):
        depths.append(depth)
        zeros = jax.numpy.zeros(depth)
        return {name: lambda: jax.jit(lambda x: x + 1).lower(zeros) for name in ("score", "update")}

    monkeypatch.setattr(bench, "programs", quick)
    cache = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    file = tmp_path / "deep" / "load.json"
    bench_load(folder, 2.0, None, 1, layers=(2, 1), file=file)
    assert cache == (jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir)
    result = json.loads(file.read_text())
    assert depths == [2, 1, 2, 1]
    row = result["load"]
    assert row.keys() == ROWS | {"ratio_to_read", "ratio_to_keep"}
    assert row["ratio_to_keep"] == row["load_seconds"] / row["keep_seconds"]
    assert [(r["program"], r["layers"], r["shallow_layers"]) for r in result["compile"]] == [
        ("score", 2, 1), ("update", 2, 1)
    ]  # fmt: skip
    assert all(r["ratio"] == r["seconds"] / r["shallow_seconds"] for r in result["compile"])
    shown = capsys.readouterr().out
    assert "score" in shown and f"{row['ratio_to_read']:.2f}" in shown


@pytest.mark.parametrize("name", ["score", "update"])
def test_the_programs_are_those_of_a_model_of_that_depth(name):
    text = programs(3)[name]().as_text()
    assert "tensor<3x32x64xf32>" in text and "tensor<5x32x64xf32>" not in text


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="--gib: expected more than 0, got 0"):
        bench_load(None, 0.0, None, 1)
    with pytest.raises(UserError, match="--rounds: expected more than 0"):
        bench_load(None, 1.0, None, 0)
    with pytest.raises(UserError, match="--dtype: expected float32 or bfloat16, got 'int8'"):
        bench_load(None, 1.0, "int8", 1)
    with pytest.raises(UserError, match=r"no config\.json; expected a model folder"):
        measure_in_process(tmp_path, None)
