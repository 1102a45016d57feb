"""The comparison of rollouts: what is measured of whom, and the ratios that are told."""

import dataclasses
import json

import numpy as np
import pytest

from fireopd_jax.bench import rollout as bench
from fireopd_jax.config import UserError
from fireopd_jax.rollout.serving import Statistics

KEYS = {
    "useful_tokens_per_cpu_second",
    "ratio_to_hf",
    "ratio_to_static",
    "programs",
    "slot_use",
    "compile_seconds",
}


def contestant(name, cpu, wall, tokens=40):
    return bench.Contestant(name, tokens, lambda: None, cpu=cpu, wall=wall)


def test_ratios_are_of_medians_and_of_the_best_of_the_others():
    work = bench.Workload("x", np.zeros((2, 3)), np.array([1, 3]), np.array([10, 30]))
    found = bench.figures(
        work,
        1,
        Statistics(drawn=3, slot_steps=4),
        [
            contestant("engine", [2.0, 9.0, 1.0], [1.0, 1.0, 8.0]),
            contestant("static batch", [6.0], [5.0]),
            contestant("hf generate, 1 threads, batch 2", [8.0], [8.0]),
            contestant("hf generate, 2 threads, batch 2", [10.0], [7.0]),
        ],
    )
    assert found["useful_tokens"] == 40 and found["useful_tokens_per_cpu_second"] == 20
    assert found["ratio_to_hf"] == 4 and found["wall_ratio_to_hf"] == 7
    assert found["ratio_to_static"] == 3 and found["slot_use"] == 0.75
    assert [each["cpu_seconds"] for each in found["contestants"]] == [2, 6, 8, 10]


def test_the_workloads_are_what_they_are_said_to_be():
    ragged, equal = bench.ragged(), bench.equal()
    assert ragged.length.min() >= 8 and ragged.length.max() <= 64 and len(ragged.length) == 64
    assert 35 < np.median(ragged.response) < 50 and ragged.room > 4 * np.median(ragged.response)
    assert set(equal.length) == {32} and set(equal.response) == {128}
    asked = ragged.requests()
    assert [len(each.prompt) for each in asked] == ragged.length.tolist()
    assert [each.knobs.max_tokens for each in asked] == ragged.response.tolist()


def test_an_unknown_rival_is_refused():
    with pytest.raises(UserError, match="expected hf"):
        bench.bench_rollout("vllm", 4, 1, None)


@pytest.mark.slow
def test_the_whole_command_writes_its_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ragged", lambda: make_work("ragged", [3, 9, 5, 1]))
    monkeypatch.setattr(bench, "equal", lambda: make_work("equal", [4, 4]))
    small = dataclasses.replace(bench.SMALL, vocab_size=64)
    monkeypatch.setitem(bench.MODELS, "small", small)
    result = bench.bench_rollout(None, 2, 1, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert result.keys() >= KEYS and result["programs"] == 1
    assert 0 < result["slot_use"] <= 1 and result["ratio_to_hf"] is None
    assert [row["useful_tokens"] for row in result["workloads"]] == [18, 8]
    assert "ragged: 18 tokens" in capsys.readouterr().out


def make_work(name, response):
    rows = len(response)
    prompt = np.arange(rows * 4, dtype=np.int32).reshape(rows, 4)
    return bench.Workload(name, prompt, np.full(rows, 4, np.int32), np.array(response, np.int32))
