"""Progress of a loop in plain lines: how often, with what, and also in the log."""

import re

import pytest

from fireopd_jax.terminal import progress as module
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.record import attach
from tests.terminal.emulator import Clock


@pytest.fixture(autouse=True)
def noon(monkeypatch):
    monkeypatch.setattr(module, "time_of_day", lambda: "12:00:00")


def test_a_line_at_first_then_every_ten_seconds_and_the_last(capsys):
    clock, kept = Clock(), []
    with (
        attach(lambda when, text: kept.append(text)),
        progress("train", 300, interactive=False, clock=clock) as advance,
    ):
        for step in range(1, 120):
            clock.now += 0.25
            advance(loss=step / 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()
    assert said[0] == ("12:00:00 train 2/300 1%, elapsed 0:00, eta 1:14, 4.0 it/s, loss 0.02")
    assert [re.findall(r"train (\d+)/", line)[0] for line in said] == ["2", "42", "82", "119"]
    assert said == [f"12:00:00 {line}" for line in kept]


def test_a_quick_loop_has_one_line(capsys):
    clock = Clock()
    with progress("rows", 3, interactive=False, clock=clock) as advance:
        for _ in range(3):
            clock.now += 0.1
            advance(1)
    assert capsys.readouterr().err == (
        "12:00:00 rows 3/3 100%, elapsed 0:00, eta 0:00, 10.0 it/s\n"
    )


def test_a_loop_that_breaks_has_a_last_line(capsys):
    clock = Clock()
    with (
        pytest.raises(KeyError),
        progress("train", 9, start=4, interactive=False, clock=clock) as advance,
    ):
        clock.now = 4.0
        advance(1)
        clock.now = 5.0
        advance(1)
        raise KeyError
    assert capsys.readouterr().err.splitlines() == [
        "12:00:00 train 5/9 56%, elapsed 0:04, eta -:--",
        "12:00:00 train 6/9 67%, elapsed 0:05, eta 0:03, 1.0 it/s",
    ]
