"""The order of a loop: report a step late, but before what saves it; stop between two steps."""

import os
import signal
import threading

import pytest

from fireopd_jax.runtime.signals import Interrupted, StopFlag, stop_on_signal
from fireopd_jax.training.loop import run_steps


def run(start, steps, *, stop=None, stop_at=None, settled=lambda done: False):
    """Run a loop that counts; return its events and the last state."""
    events = []
    stop = stop or StopFlag()

    def advance(state, step):
        events.append(("advance", step))
        if step == stop_at:
            stop(signal.SIGINT, None)
        return state + 1, f"metrics {step}"

    def report(done, metrics):
        assert metrics == f"metrics {done - 1}"
        events.append(("report", done))
        return {}

    def after(done, state, stopping):
        assert state == done
        events.append(("stopping" if stopping else "after", done))

    try:
        state = run_steps("count", start, start, steps, advance, report, after, stop, settled)
    except Interrupted as error:
        events.append(("interrupted", str(error)))
        state = None
    return events, state


def test_a_step_is_reported_while_the_next_one_runs():
    events, state = run(0, 3)
    assert state == 3
    assert [e for e in events if e[0] != "after"] == [
        ("advance", 0),
        ("advance", 1), ("report", 1),
        ("advance", 2), ("report", 2),
        ("report", 3),
    ]  # fmt: skip
    assert [done for name, done in events if name == "after"] == [1, 2, 3]


def test_what_is_saved_has_been_reported():
    events, _ = run(0, 4, settled=lambda done: done == 2)
    assert events.index(("report", 2)) < events.index(("after", 2))
    assert events.index(("report", 3)) > events.index(("after", 3))
    assert [done for name, done in events if name == "report"] == [1, 2, 3, 4]


def test_a_loop_goes_on_from_where_it_was():
    events, state = run(2, 4)
    assert state == 4 and [s for name, s in events if name == "advance"] == [2, 3]
    assert run(4, 4) == ([], 4)


def test_a_signal_ends_the_loop_after_a_last_save():
    events, state = run(0, 5, stop_at=1)
    assert state is None
    assert events[-3:] == [
        ("report", 2),
        ("stopping", 2),
        ("interrupted", "count: stopped after step 2 of 5"),
    ]


def test_a_signal_in_the_last_step_lets_the_loop_end():
    events, state = run(0, 2, stop_at=1)
    assert state == 2 and ("stopping", 2) in events


def test_signals_are_caught_once_and_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            stop(signal.SIGINT, None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


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


@pytest.mark.parametrize("settled", [lambda done: False, lambda done: True])
def test_a_loop_that_has_had_enough_ends_at_the_same_step_however_it_saves(settled):
    reported = []

    def report(done, metrics):
        reported.append(done)
        return {}

    state = run_steps(
        "count", 0, 0, 9, lambda state, step: (state + 1, None), report,
        lambda done, state, stopping: None, StopFlag(), settled,
        enough=lambda done: 3 in range(done),
    )  # fmt: skip
    assert state == 4 and reported == [1, 2, 3, 4]
