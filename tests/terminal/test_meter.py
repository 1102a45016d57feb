"""The line of a loop: what comes first, what fits, and what counts for rate and time left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from fireopd_jax.terminal.meter import Meter, fitted, span
from tests.terminal.emulator import Clock

SHOWN = {"kl": 0.21234, "length": 48.25, "tok/s": 812.0}


def meter(start=0, seconds=(40.0, 2.0, 2.0, 2.0), label="distil student", total=100):
    """Return a loop after one unit for each of `seconds`: the first compiles."""
    clock = Clock(1000.0)
    made = Meter(label, total, start, clock)
    for each in seconds:
        clock.now += each
        made.add(1, SHOWN)
    return made, clock


def test_count_and_time_left_come_first_then_what_fits():
    made, _ = meter()
    assert made.line(79).startswith("distil student  4/100  eta 3:12  0:46  2.0 s/it  kl 0.2123")
    assert made.line(40) == "distil student  4/100  eta 3:12  0:46"
    assert made.line(30) == "distil stude…  4/100  eta 3:12"
    assert made.line(20) == "di…  4/100  eta 3:12"
    assert made.line(3) == "4/…"
    wide = made.line(119)
    assert "length 48.25" in wide and "tok/s 812" in wide and wide.endswith("─")


@given(
    width=st.integers(1, 200),
    label=st.text(max_size=60),
    done=st.integers(0, 10**7),
    value=st.floats(),
)
def test_no_line_is_wider_than_asked(width, label, done, value):
    made = Meter(label, 10**7, 0, Clock())
    made.add(done, {label: value, "kl": value, "text": label})
    line = made.line(width)
    assert cell_len(line) <= width and "\n" not in line and "\x1b" not in line


def test_neither_compilation_nor_restored_units_count():
    made, _ = meter()
    assert made.seconds_per_unit() == 2.0 and made.left() == 192.0
    resumed, _ = meter(start=90)
    assert resumed.count() == "94/100"
    assert resumed.seconds_per_unit() == 2.0 and resumed.left() == 12.0


def test_before_the_second_unit_nothing_is_claimed():
    made, _ = meter(start=50, seconds=(40.0,))
    assert made.left() is None and made.rate() == ""
    assert made.plain() == (
        "distil student 51/100 51%, elapsed 0:40, eta -:--, kl 0.2123, length 48.25, tok/s 812"
    )


def test_the_time_left_runs_down_between_units_and_ends_at_zero():
    made, clock = meter()
    clock.now += 1.5
    assert made.left() == 190.5
    clock.now += 1000
    assert made.left() == 0.0
    done, _ = meter(total=4)
    assert done.left() == 0.0 and "eta 0:00" in done.plain()


def test_the_rate_follows_the_newest_units():
    made, _ = meter(seconds=(40.0, *[10.0] * 100, *[1.0] * 60), total=1000)
    assert made.seconds_per_unit() == 1.0 and made.rate() == "1.0 it/s"


@pytest.mark.parametrize(
    "seconds, shown",
    [(None, "-:--"), (0, "0:00"), (61.9, "1:01"), (3600, "1:00:00"), (93784, "26:03:04")],
)
def test_spans(seconds, shown):
    assert span(seconds) == shown


def test_wide_characters_are_counted_as_they_are_shown():
    assert (
        fitted("数学数学", 5) == "数学…" and fitted("数学", 4) == "数学" and fitted("数学", 0) == ""
    )
