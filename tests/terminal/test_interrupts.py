"""The first signal is answered at once, past all buffers, and in the log."""

import os
import signal

import pytest

from fireopd_jax.terminal import interrupts
from fireopd_jax.terminal.record import attach


@pytest.mark.parametrize(
    "number, name",
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
)
def test_the_answer_is_on_stderr_and_in_the_log(monkeypatch, number, name):
    read, write = os.pipe()
    monkeypatch.setattr(interrupts, "STDERR", write)
    kept = []
    with attach(lambda when, text: kept.append(text)):
        interrupts.answer(number)
    os.close(write)
    with os.fdopen(read) as screen:
        assert screen.read() == f"{kept[0]}\n"
    assert kept == [f"{name}: stopping after this step, then saving; Ctrl-C again to stop now"]


def test_a_terminal_that_is_gone_costs_nothing(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(interrupts, "STDERR", write)
    kept = []
    with attach(lambda when, text: kept.append(text)):
        interrupts.answer(signal.SIGINT)
    os.close(write)
    interrupts.answer(signal.SIGINT)
    assert len(kept) == 1
