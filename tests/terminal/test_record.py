"""What is shown reaches the log of a run: also what came before the log."""

import warnings

from fireopd_jax.terminal.record import attach, keep, recording, say
from fireopd_jax.terminal.tables import table


def test_what_was_shown_before_the_log_is_passed_on_with_its_time(capsys):
    kept = []
    with recording() as record:
        say("first")
        keep("second")
        assert record.texts == 2
        with attach(lambda when, text: kept.append((when, text))):
            assert [text for _, text in kept] == ["first", "second"]
            keep("third")
        keep("after the log")
    keep("after the run")
    assert [text for _, text in kept] == ["first", "second", "third"]
    assert sorted(when for when, _ in kept) == [when for when, _ in kept]
    assert capsys.readouterr().out == "first\n"


def test_a_recording_inside_another_goes_on_with_it():
    kept = []
    with recording() as outer, recording() as inner:
        assert inner is outer
        keep("held")
        with attach(lambda when, text: kept.append(text)):
            pass
    assert kept == ["held"]


def test_a_new_run_has_nothing_of_the_last():
    with recording():
        keep("of the first run")
    kept = []
    with attach(lambda when, text: kept.append(text)):
        keep("of the second")
    assert kept == ["of the second"]


def test_control_characters_do_not_reach_the_file_or_the_screen(capsys):
    kept = []
    with attach(lambda when, text: kept.append(text)):
        say("\x1b[2J")
    assert kept == [r"\x1b[2J"] and capsys.readouterr().out == "\\x1b[2J\n"


def test_tables_and_warnings_are_kept(capsys):
    kept, shown = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        with attach(lambda when, text: kept.append(text)):
            table([["[a]\x1b[2J", 0.5]], ["name", "value"], title="Scores")
            warnings.warn("odd", stacklevel=1)
        assert shown == ["odd"]
    assert kept[0] == "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert r"[a]\x1b[2J" in kept[0] and "Scores" in kept[0]
    assert kept[1].endswith("UserWarning: odd")
