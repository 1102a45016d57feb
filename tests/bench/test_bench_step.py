"""The benchmark of a step: complete figures, the last line, mistakes; times are not tested."""

import dataclasses
import json
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from fireopd_jax import cli
from fireopd_jax.bench import step as bench
from fireopd_jax.bench import trl
from fireopd_jax.bench.step_stages import STAGES
from fireopd_jax.bench.workload import equal
from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.models.work import Work

SIZES = {
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
}
STUDENT = dataclasses.replace(bench.PAIRS["small"][0], **SIZES)


def call(monkeypatch, *arguments):
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "bench", "step", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


@pytest.fixture
def tiny(monkeypatch):
    def make(rows):
        made = equal(rows, 6, 5)
        return dataclasses.replace(
            made,
            prompt=made.prompt % SIZES["vocab_size"],
            response=np.array([5, 1, 3, 2, 4, 1][:rows], np.int32),
        )

    monkeypatch.setitem(bench.PAIRS, "tiny", (STUDENT, STUDENT))
    monkeypatch.setitem(bench.WORKLOADS, "tiny", (make, 6))


def test_the_last_line_is_the_protocols_and_decoded_scores_cost_nothing(
    monkeypatch, capsys, tmp_path, tiny
):
    limited = []
    monkeypatch.setenv("BENCH_THREADS", "1")
    monkeypatch.setattr("os.sched_setaffinity", lambda *a: limited.append(a), raising=False)
    file = tmp_path / "step.json"
    options = ("--model", "tiny", "--lengths", "tiny", "--rounds", "1", "--result-line")
    assert call(monkeypatch, *options, "--json", str(file)) == 0
    assert len(limited) == 1 and len(limited[0][1]) == 1
    result = json.loads(file.read_text(encoding="utf-8"))
    meta = {"device", "platform", "cores", "jax", "rounds", "workload", "ratio_to_trl"}
    assert meta < set(result) and result["ratio_to_trl"] is result["packed_to_padded"] is None
    assert result["layout"] == "packed" and result["student_scores"] == "decode"
    assert result["cpu_seconds"] > 0 and result["peak_rss_mib"] > 0
    assert result["workload"]["response_tokens"] == 16
    assert result["workload"]["fill"] == pytest.approx((36 + 16) / (6 * 11))
    check_stages(result)
    learning = sum(each["cpu_seconds"] for each in result["stages"][1:])
    assert result["us_per_token"] == pytest.approx(1e6 * learning / (36 + 16))
    own = result["stages"][1]
    assert own["flops"] == own["floor_seconds"] == own["scratch_mib"] == 0
    word, _, line = capsys.readouterr().out.strip().splitlines()[-1].partition(" ")
    last = json.loads(line)
    assert word == "RESULT" and last["mode"] == "fireopd_packed"
    assert len(last["seconds"]) == len(last["cpu_s"]) == len(last["tokens_per_s"]) == 1
    assert last["peak_rss_mib"] > 0


@pytest.mark.slow
def test_both_layouts_are_measured_and_the_student_by_a_program_of_its_own(tiny):
    options = bench.Options("tiny", "tiny", rows=5, layout="both", student_scores="forward")
    result = bench.bench_step(options, 2)
    assert [each["layout"] for each in result["layouts"]] == ["packed", "padded"]
    for row in result["layouts"]:
        assert row["student_scores"] == "forward"
        check_stages(row)
    assert result["packed_to_padded"] > 0 and result["workload"]["rows"] == 5


def check_stages(row):
    """Check that each stage that ran has its figures, and that the step has their sum."""
    assert tuple(each["stage"] for each in row["stages"]) == STAGES
    ran = [each for each in row["stages"] if each["flops"]]
    assert len(ran) == (3 if row["student_scores"] == "decode" else 4)
    for each in ran:
        for key in ("cpu_seconds", "wall_seconds", "floor_seconds", "flop_use", "scratch_mib"):
            assert each[key] > 0, (each, key)
    assert sum(each["flops"] for each in ran) == row["flops"]
    assert row["ratio_to_floor"] == pytest.approx(row["cpu_seconds"] / row["floor_seconds"])


def test_work_counts_what_a_row_cannot_do_without():
    prompt, response = np.array([3, 2], np.int32), np.array([4, 1], np.int32)
    lengths = [3 + 4 - 1, 2 + 1 - 1]
    work = Work.of(prompt, response)
    pairs = sum(i + 1 for n in lengths for i in range(n))
    assert work == Work(tokens=sum(lengths), pairs=pairs, predicted=5)
    rest = work.without(Work.prefill(prompt))
    assert rest == Work(tokens=3, pairs=4 + 5 + 6, predicted=3)
    kernels = 16 * (16 + 8 + 8 + 16 + 3 * 16)
    flops = 2 * kernels * work.tokens + 2 * 2 * 16 * pairs + 2 * 16 * 512 * work.predicted
    assert work.flops(LanguageModel(STUDENT, 512)) == flops


@pytest.mark.parametrize("fill", [0.1, 0.35, 1.0])
def test_lengths_are_scaled_to_a_fill_and_rows_remain_as_wide(fill):
    drawn = bench.heavy_tailed(64)
    work = bench.Options(lengths="heavy-tailed", rows=64, fill=fill).work()
    assert bench.describe(work)["fill"] == pytest.approx(fill, abs=0.005)
    assert work.room == drawn.room and work.prompt.shape == drawn.prompt.shape
    assert work.length.min() >= 1 and work.response.min() >= 1
    if fill < 1:
        shorter = drawn.response.argsort()
        assert (np.diff(work.response[shorter]) >= 0).all() and len(set(work.response)) > 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "smal"), "--model smal: expected small"),
        (("--lengths", "long"), "--lengths long: expected equal, heavy-tailed, nano"),
        (("--layout", "rows"), "--layout rows: expected packed, padded, both"),
        (("--student-scores", "x"), "--student-scores x: expected decode, forward"),
        (("--rows", "4"), "--rows: expected at least 5, got 4"),
        (("--fill", "0"), "--fill: expected a share above 0 and up to 1, got 0.0"),
        (("--compare", "verl"), "--compare verl: expected trl"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, words):
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fireopd: ") and error.count("\n") == 1 and words in error


def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("BENCH_THREADS", "two")
    assert call(monkeypatch, "--result-line") == 2
    assert "BENCH_THREADS=two: expected a number of threads" in capsys.readouterr().err


def test_what_the_comparison_lacks_is_named_with_its_install(monkeypatch):
    monkeypatch.setattr(trl, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(UserError, match=r"needs trl: pip install fireopd-jax\[parity\] trl"):
        bench.bench_step(bench.Options(compare="trl"), 1)


def trainer(code):
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(errors := tempfile.TemporaryFile("w+")),  # noqa: SIM115 the trainer's to close
        text=True,
    )
    return trl.Trainer(1, process, errors)


def test_a_trainers_steps_are_read_and_its_end_is_one_line():
    step = 'print("noise\\nSTEP {\\"cpu\\": 2.0, \\"wall\\": 3.0}", flush=True)'
    own = trainer(f"input(); {step}; input(); raise SystemExit('out of memory')")
    with own.errors:
        own.round()
        row = own.row()
        assert (row["cpu_seconds"], row["wall_seconds"]) == (2.0, 3.0) and row["peak_rss_mib"] > 0
        with pytest.raises(UserError, match="has ended: out of memory"):
            own.round()
        own.close()
        for pipe in (own.process.stdin, own.process.stdout):
            assert pipe is not None
            pipe.close()
