"""SIGKILL from outside, ten times, at moments that nobody has chosen: the same bits in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.training.test_kill_matrix import SETTINGS

KILLS, STEPS = 10, 44
OWN = [*SETTINGS, f"run.steps={STEPS}", "run.save_every=1", "eval.every=11", "student.sft=null"]
MEASURED = ("perf/", "timing_s/")
"""What differs from one process to the next: seconds, tokens a second, compilations."""


def begin(folder):
    return subprocess.Popen(
        [sys.executable, "-m", "fireopd_jax", "train", *OWN, f"run.dir={folder}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def logged(folder):
    """Return the lines of the metrics that are whole; the last one of a killed run may not be."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def of_steps(folder):
    """Return what was logged, without what was measured, in the order of the file, NaN as text."""
    return [
        {key: str(value) for key, value in line.items() if not key.startswith(MEASURED)}
        for line in logged(folder)
    ]


@pytest.mark.slow
@pytest.mark.kill
def test_a_run_that_is_killed_ten_times_ends_with_the_same_bits(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    printed, _ = begin(whole).communicate()
    assert (whole / "summary.json").is_file(), printed
    drawn = random.Random()
    reached = []
    for kill in range(KILLS):
        process = begin(folder)
        # A run begins where it was saved last: at the earliest a few steps before it was killed.
        aim = (kill + 1) * STEPS // (KILLS + 1)
        while process.poll() is None:
            steps = max((line["step"] for line in logged(folder)), default=0)
            if steps >= aim:
                break
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, printed
        reached.append(steps)
    assert reached == sorted(reached) and reached[-1] < STEPS
    printed, _ = begin(folder).communicate()
    assert "resuming from step" in printed, printed
    once, again = (json.loads((run / "summary.json").read_text()) for run in (whole, folder))
    assert again["params_sha256"] == once["params_sha256"]
    assert {**again, "seconds": 0} == {**once, "seconds": 0}
    assert of_steps(folder) == of_steps(whole)
