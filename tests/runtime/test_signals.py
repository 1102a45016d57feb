"""Signals become a flag while a run is open, are answered at once, and save before they end."""

import signal
import subprocess
import sys
import threading

import pytest

from fireopd_jax.runtime.signals import Interrupted, StopFlag, stop_on_signal

ENDED_BY_THE_THIRD = """
import os, signal, sys
from fireopd_jax.runtime.signals import stop_on_signal
with stop_on_signal() as stop, stop.saving():
    for _ in range(3):
        signal.raise_signal(signal.SIGINT)
    while True:
        signal.pause()
"""


def test_signals_are_caught_once_and_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            stop(signal.SIGINT, None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_terminal_that_closes_stops_a_run_as_a_scheduler_does(monkeypatch):
    # As if the tests themselves were not run by `nohup`, which ignores it.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # the shell sends its own
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGHUP


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_answered_by_a_thread_once():
    numbers, answered = [], threading.Event()

    def answer(number):
        numbers.append((number, threading.current_thread() is threading.main_thread()))
        answered.set()
        raise RuntimeError("a line that cannot be printed")

    with stop_on_signal(answer) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert answered.wait(60) and stop
        signal.raise_signal(signal.SIGTERM)
    assert numbers == [(signal.SIGTERM, False)]


def test_where_nothing_is_to_be_saved_a_signal_interrupts_at_once():
    with stop_on_signal(eager=True) as stop:
        with stop.held():
            signal.raise_signal(signal.SIGTERM)
            assert stop
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.check()
    with stop_on_signal(eager=True), pytest.raises(Interrupted, match="SIGINT"):
        signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_waits_for_what_is_being_saved():
    stop, saved = StopFlag(), []
    with pytest.raises(KeyboardInterrupt), stop.saving():
        stop(signal.SIGINT, None)
        with stop.saving():
            stop(signal.SIGINT, None)
        saved.append("all of it")
    assert saved == ["all of it"]
    stop(signal.SIGTERM, None)  # not a second Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)


@pytest.mark.kill
def test_a_third_interrupt_ends_the_process():
    done = subprocess.run([sys.executable, "-c", ENDED_BY_THE_THIRD], capture_output=True)
    assert done.returncode == 128 + signal.SIGINT and not done.stderr


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def work():
        with stop_on_signal() as stop:
            seen.append(bool(stop))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False] and signal.getsignal(signal.SIGINT) == before
