"""The log of a run: the file has all that is shown, and does not need the screen."""

import logging
import os
import sys
import time

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.runs.log import Log
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.record import recording, say
from fireopd_jax.terminal.tables import table


def kept(folder):
    """Return the lines of a log without their times, which are checked."""
    found = []
    for line in (folder / "logs" / "run.log").read_text(encoding="utf-8").splitlines():
        time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
        assert line[19] == " "
        found.append(line[20:])
    return found


def test_log_prints_and_keeps(tmp_path, capsys):
    with Log(tmp_path / "logs") as log:
        log("one\ntwo")
    assert capsys.readouterr().out == "one\ntwo\n"
    kept = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert [line[20:] for line in kept] == ["one", "two"]


def test_log_keeps_the_warnings_of_modules_while_it_is_open(tmp_path):
    warn = logging.getLogger("fireopd_jax.models.somewhere").warning
    with Log(tmp_path / "logs"):
        warn("m: one file is read, another is not")
    warn("afterwards")
    kept = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert [line[20:] for line in kept] == ["m: one file is read, another is not"]


def test_the_log_has_what_was_shown_before_it_and_beside_it(tmp_path, capsys):
    with recording():
        say("fireopd 1.0")
        with Log(tmp_path / "logs") as log:
            log("writing")
            with progress("train", 3, interactive=False) as advance:
                advance(3)
            table([["a", 0.5]], ["name", "value"], title="Results")
            say("of elsewhere")
    lines = kept(tmp_path)
    assert lines[:2] == ["fireopd 1.0", "writing"]
    assert lines[2].startswith("train 3/3 100%, elapsed")
    assert "Results" in lines and lines[-1] == "of elsewhere"
    assert capsys.readouterr().out.splitlines()[0] == "fireopd 1.0"


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("x.yaml:3: no such key"), "error: x.yaml:3: no such key"),
        (Interrupted("stopped after step 3"), "stopped after step 3"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("of ours"), "ValueError: of ours"),
    ],
)
def test_the_error_that_ends_a_run_is_in_its_log(tmp_path, error, line):
    with pytest.raises(type(error)), Log(tmp_path / "logs"):
        raise error
    assert kept(tmp_path)[-1] == line
    traced = "Traceback (most recent call last):" in kept(tmp_path)
    assert traced == isinstance(error, ValueError)


def test_the_file_is_written_before_the_screen(tmp_path, monkeypatch):
    class Dead:
        def write(self, text):
            assert kept(tmp_path) == ["a line"]
            raise BrokenPipeError

        def flush(self):
            pass

    with Log(tmp_path / "logs") as log:
        monkeypatch.setattr(sys, "stdout", Dead())
        with pytest.raises(BrokenPipeError):
            log("a line")
        monkeypatch.undo()
    assert kept(tmp_path) == ["a line"]


def test_a_file_that_cannot_be_written_is_said_once_and_costs_nothing(
    tmp_path, monkeypatch, capsys
):
    with Log(tmp_path / "logs") as log:

        def full(file, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        log("one")
        log("two")
        monkeypatch.undo()
        log("three")
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\nthree\n" and kept(tmp_path) == ["three"]
    assert printed.err.count("No space left on device") == 1


def test_warnings_of_other_packages_are_kept_and_still_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with Log(tmp_path / "logs"):
        logging.getLogger("orbax").warning("slow disk")
    assert kept(tmp_path) == ["orbax: slow disk"]
    assert capsys.readouterr().err == "slow disk\n"


def test_a_response_cannot_forge_lines_or_commands(tmp_path, capsys):
    with Log(tmp_path / "logs") as log:
        log("response: \x1b[2J\rdone\x85done")
    assert kept(tmp_path) == [r"response: \x1b[2J\rdone\x85done"]
    assert capsys.readouterr().out == "response: \\x1b[2J\\rdone\\x85done\n"
