"""Seconds by stage, of device and host; measuring blocks neither."""

import threading
import time
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.runtime.clock import StageClock


class Output:
    """An output of a program that is ready when the test says so."""

    all: ClassVar[list] = []

    def __init__(self):
        self.done = threading.Event()
        self.array = np.full(1, len(self.all))
        self.all.append(self)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def ends(monkeypatch):
    """Return a function that marks an output as ready and waits until the clock records it."""
    monkeypatch.setattr("jax.block_until_ready", lambda array: Output.all[array[0]].done.wait())

    def end(clock, output, step, left):
        output.done.set()
        while clock._waiting[step] > left:
            time.sleep(0.001)

    return end


def test_a_stage_lasts_from_the_end_of_the_one_before_to_its_own(ends):
    time_of = Clock()
    with StageClock(clock=time_of) as clock:
        outputs = Output(), Output()
        for name, output in zip(("rollout", "score"), outputs, strict=True):
            with clock.stage(name) as ready:
                ready(output.array)
        time_of.now = 103.0  # both were dispatched at 100
        ends(clock, outputs[0], 0, 1)
        time_of.now = 104.5
        ends(clock, outputs[1], 0, 0)
        assert clock.take(0) == {"rollout": 3.0, "score": 1.5, "compile": 0.0}


def test_an_idle_device_is_nobodys_time(ends):
    time_of = Clock()
    with StageClock(clock=time_of) as clock:
        first, second = Output(), Output()
        with clock.stage("rollout") as ready:
            ready(first.array)
        time_of.now = 101.0
        ends(clock, first, 0, 0)
        time_of.now = 150.0
        with clock.stage("score") as ready:
            ready(second.array)
        time_of.now = 152.0
        ends(clock, second, 0, 0)
        assert clock.take(0) == {"rollout": 1.0, "score": 2.0, "compile": 0.0}


def test_the_host_does_not_wait_for_the_stages_of_the_next_step(ends):
    with StageClock(step=4) as clock:
        this, following = Output(), Output()
        with clock.stage("update") as ready:
            ready(this.array)
        clock.next()
        with clock.host("eval"):
            pass
        with clock.stage("rollout") as ready:
            ready(following.array)
        this.done.set()
        assert set(clock.take(4)) == {"update", "compile"}  # although step 5 still runs
        following.done.set()
        assert set(clock.take(5)) == {"eval", "rollout", "compile"}
        assert clock.take(6) == {} and set(clock.totals) == {"update", "eval", "rollout", "compile"}


def test_compilation_is_counted_apart(monkeypatch):
    time_of = Clock()
    monkeypatch.setattr("jax.block_until_ready", lambda output: output)
    with StageClock(clock=time_of) as clock:
        with clock.stage("score") as ready:
            clock._compiled._total.count += 1  # a program was compiled
            time_of.now = 107.0
            ready(jnp.zeros(1))
        taken = clock.take(0)
        assert taken["compile"] == 7.0 and taken["score"] == 0.0


def test_a_program_that_failed_does_not_hang_the_run(monkeypatch):
    def fails(output):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("jax.block_until_ready", fails)
    with StageClock() as clock:
        with clock.stage("score") as ready:
            ready(np.zeros(1))
        assert "score" in clock.take(0)
