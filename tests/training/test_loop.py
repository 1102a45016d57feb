"""The order of a loop: report a step late, but before what saves it; stop between two steps."""

import signal

import pytest

from fireopd_jax.runtime.signals import Interrupted, StopFlag
from fireopd_jax.training.loop import StepLoop


def run(start, steps, *, stop_at=None, saves=lambda done: False, enough=lambda step: False):
    """Run a loop that counts; return its events and the last state."""
    events, stop, shown = [], StopFlag(), []

    def report(done, metrics):
        assert metrics == f"metrics {done - 1}"
        events.append(("report", done))
        return {"metrics": metrics}

    def advance(n=1, **show):
        shown.append((n, show))

    loop, state = StepLoop("count", start, steps, report, stop=stop, advance=advance), start
    try:
        for step in loop:
            if enough(step):
                break
            events.append(("step", step))
            if step == stop_at:
                stop(signal.SIGINT, None)
            state += 1
            loop.dispatched(state, f"metrics {step}", flush=saves(state))
            events.append(("stopping" if loop.stopping else "after", state))
        loop.flush()
    except Interrupted as error:
        events.append(("interrupted", str(error)))
        state = None
    # The progress moves on by one with each report.
    assert [n for n, _ in shown] == [1] * sum(name == "report" for name, _ in events)
    return events, state


def test_a_step_is_reported_while_the_next_one_runs():
    events, state = run(0, 3)
    assert state == 3
    assert [e for e in events if e[0] != "after"] == [
        ("step", 0),
        ("step", 1), ("report", 1),
        ("step", 2), ("report", 2),
        ("report", 3),
    ]  # fmt: skip
    assert [done for name, done in events if name == "after"] == [1, 2, 3]


def test_what_is_saved_has_been_reported():
    events, _ = run(0, 4, saves=lambda done: done == 2)
    assert events.index(("report", 2)) < events.index(("after", 2))
    assert events.index(("report", 3)) > events.index(("after", 3))
    assert [done for name, done in events if name == "report"] == [1, 2, 3, 4]


def test_a_loop_goes_on_from_where_it_was():
    events, state = run(2, 4)
    assert state == 4 and [s for name, s in events if name == "step"] == [2, 3]
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


@pytest.mark.parametrize("saves", [lambda done: False, lambda done: True])
def test_a_loop_that_has_had_enough_ends_at_the_same_step_however_it_saves(saves):
    events, state = run(0, 9, saves=saves, enough=lambda step: step == 4)
    assert state == 4
    assert [done for name, done in events if name == "report"] == [1, 2, 3, 4]
