"""The rollout benchmark: what is measured of each contestant, and the reported ratios."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fireopd_jax.bench import contestants, workload
from fireopd_jax.bench import rollout as bench
from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.rollout.statistics import Statistics

KEYS = {
    "useful_tokens_per_cpu_second",
    "ratio_to_hf",
    "ratio_to_static",
    "programs",
    "slot_use",
    "compile_seconds",
}


def contestant(name, cpu, wall, tokens=40):
    return workload.Contestant(name, tokens, lambda: None, cpu=cpu, wall=wall)


def test_ratios_are_of_medians_and_of_the_best_of_the_others():
    work = workload.Workload("x", np.zeros((2, 3)), np.array([1, 3]), np.array([10, 30]))
    found = bench.summary(
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


def test_workloads_have_their_documented_lengths():
    ragged, equal = workload.workloads("small", 16)
    assert ragged.length.min() >= 8 and ragged.length.max() <= 64 and len(ragged.length) == 64
    assert 35 < np.median(ragged.response) < 50 and ragged.room > 4 * np.median(ragged.response)
    assert set(equal.length) == {32} and set(equal.response) == {128}
    (large,) = workload.workloads("qwen3-0.6b", 128)
    assert len(large.length) == 512 and large.length.min() >= 32 and large.room == 512
    part = large.first(128)
    assert part.tokens == large.response[:128].sum() and len(part.prompt) == 128
    asked = ragged.requests()
    assert [len(each.prompt) for each in asked] == ragged.length.tolist()
    assert [each.knobs.max_tokens for each in asked] == ragged.response.tolist()


def test_ratio_to_hugging_face_uses_the_engines_best_number_of_cores():
    work = workload.Workload("x", np.zeros((1, 3)), np.array([1]), np.array([40]))
    found = bench.summary(
        work,
        1,
        Statistics(),
        [
            contestant("engine", [2.0], [1.0]),
            contestant("static batch", [6.0], [5.0]),
            contestant("hf generate, 1 threads, batch 2", [8.0], [8.0]),
            contestant("engine, 1 core", [1.0], [1.5]),
        ],
    )
    assert found["ratio_to_hf"] == 8 and found["wall_ratio_to_hf"] == 8
    assert found["ratio_to_static"] == 3 and found["useful_tokens_per_cpu_second"] == 20


@pytest.mark.slow
def test_an_engine_of_one_core_counts_its_own_seconds():
    work = make_work("ragged", [3, 9, 5, 1])
    model = LanguageModel(workload.SMALL, 64)
    alone = contestants.on_one_core(model, work, 2, bench.DENSE)
    workload.measure([alone], 2)
    assert len(alone.cpu) == 2
    for cpu, wall in zip(alone.cpu, alone.wall, strict=True):
        assert 0 < cpu < 1.1 * wall + 0.1


def test_off_cpu_rates_are_by_wall_clock_and_each_contestants_own_tokens():
    work = workload.Workload("x", np.zeros((1, 3)), np.array([1]), np.array([10]))
    ours = contestant("engine", [2.0], [1.0])
    found = bench.summary(work, 1, Statistics(), [ours], False)
    assert found["ratio_to_hf"] is None and found["ratio_to_static"] is None
    assert found["useful_tokens_per_second"] == 40
    part = contestant("hf generate", [0.1], [2.0], tokens=10)
    found = bench.summary(work, 1, Statistics(), [ours, part], False)
    assert found["ratio_to_hf"] == found["wall_ratio_to_hf"] == 8
    assert [each["useful_tokens"] for each in found["contestants"]] == [40, 10]


def test_memory_floor_counts_weights_per_step_and_attended_positions():
    model = LanguageModel(dataclasses.replace(workload.SMALL, dtype="bfloat16"), 64)
    params = jax.eval_shape(model.init, jax.random.key(0))
    work = workload.Workload("x", np.zeros((2, 3), int), np.array([3, 1]), np.array([2, 4]))
    found = bench.memory_floor(model, params, work, Statistics(steps=12), 2, 1e9)
    c = model.config
    layer = 2 * c.hidden_size * (8 + 4) * 32 + 3 * c.hidden_size * c.intermediate_size
    norms = (c.num_hidden_layers * 2 + 1) * c.hidden_size + c.num_hidden_layers * 2 * 32
    matrices = 64 * c.hidden_size + c.num_hidden_layers * layer
    assert found["weight_bytes"] == 2 * matrices + 4 * norms
    # Token t of a response looks at the prompt and at t tokens: 3 + 4, and 1 + 2 + 3 + 4.
    assert found["cache_bytes"] == 17 * 2 * 4 * 4 * 32 * 2
    read = 4 * found["weight_bytes"] + found["cache_bytes"]
    assert found["floor_seconds"] == pytest.approx(read / 1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "vllm"}, "--compare vllm: expected hf"),
        ({"name": "qwen3-0.6"}, r"--model qwen3-0.6: expected small, .*did you mean"),
        (
            {"cache": "page"},
            "--cache page: expected auto, dense, dense_gpu, paged, paged_gpu, paged_tpu",
        ),
        ({"cache": "paged_gpu"}, "--cache paged_gpu runs on GPU only, this machine has CPU"),
        ({"cache": "dense_gpu"}, "--cache dense_gpu runs on GPU only, this machine has CPU"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        bench.bench_rollout(**{"compare": None, "slots": 4, "rounds": 1, "file": None} | options)


@pytest.mark.slow
def test_the_whole_command_writes_its_figures(monkeypatch, tmp_path, capsys):
    works = [make_work("ragged", [3, 9, 5, 1]), make_work("equal", [4, 4])]
    monkeypatch.setattr(bench, "workloads", lambda name, slots: works)
    small = dataclasses.replace(workload.SMALL, vocab_size=64)
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
    return workload.Workload(name, prompt, np.full(rows, 4, np.int32), np.array(response, np.int32))
