"""What is wrong with a user's disk is one line; what is wrong with us is in the run's log."""

import errno
import os
import subprocess
import sys

import pytest

from fireopd_jax import cli
from fireopd_jax.cli.main import of_machine
from fireopd_jax.config import UserError
from fireopd_jax.runs.folder import RunFolder
from fireopd_jax.runs.log import Log
from fireopd_jax.runtime.files import recorded, write_atomically
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.training.interruptions import resumable


def call(monkeypatch, error):
    """Run the command line, whose command raises `error`; return its exit status."""

    def fail(settings):
        raise error

    monkeypatch.setattr("fireopd_jax.recipe.schema.load", fail)
    monkeypatch.setattr(sys, "argv", ["fireopd", "train", "smoke"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x", None, "y"), "x -> y: No such file"),
        (RuntimeError("Unable to initialize backend 'x'"), "backend 'x'; fireopd env"),
        (UserError("a" * 5000), "aaa...aaa"),
        (ImportError("libx.so.1: failed to map segment"), "cannot be loaded: libx.so.1"),
        (MemoryError(), "no more memory"),
        (OSError(errno.ENOENT, "No usable temporary directory found in ['a']"), "TMPDIR"),
    ],
)  # fmt: skip
def test_an_error_of_the_disk_is_one_line(monkeypatch, capsys, error, line):
    assert call(monkeypatch, error) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fireopd: ") and line in printed and printed.count("\n") == 1


def test_an_error_of_the_disk_below_another_is_found():
    below = OSError(errno.ENOSPC, "No space left on device", "summary.json")
    try:
        raise RuntimeError("could not") from below
    except RuntimeError as error:
        assert of_machine(error) == "summary.json: No space left on device"
    assert of_machine(ConnectionError("refused")) is None and of_machine(KeyError("a")) is None


def test_a_setting_of_jax_in_the_environment_is_one_line(tmp_path):
    command = [sys.executable, "-m", "fireopd_jax", "env"]
    for name, value, words in (
        ("JAX_ENABLE_X64", "perhaps", "(JAX_ENABLE_X64): invalid truth value 'perhaps'"),
        ("JAX_PLATFORMS", "cuda", "no device for JAX_PLATFORMS=cuda"),
    ):
        settings = {key: own for key, own in os.environ.items() if not key.startswith("JAX_")}
        done = subprocess.run(
            command, env=settings | {name: value}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_a_working_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert call(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file or directory")) == 2
    assert "was started in is gone" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)


def test_an_error_of_ours_in_a_run_is_in_its_log(tmp_path, monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError) as raised, Log(tmp_path):
        1 / 0  # noqa: B018
    logged = (tmp_path / "run.log").read_text()
    assert "Traceback" in logged and "ZeroDivisionError" in logged
    assert call(monkeypatch, raised.value) == 1
    printed = capsys.readouterr().err
    assert str(tmp_path / "run.log") in printed and "Traceback" not in printed
    assert printed.count("\n") == 1


def test_how_a_run_was_stopped_or_refused_is_in_its_log(tmp_path):
    for error in (Interrupted("stopped after step 3"), UserError("data.path: no file")):
        with pytest.raises(type(error)), Log(tmp_path):
            raise error
    logged = (tmp_path / "run.log").read_text()
    assert "stopped after step 3" in logged and "no file" in logged and "Traceback" not in logged


def test_a_log_takes_any_text_and_outlives_its_disk(tmp_path, monkeypatch, capsys):
    with Log(tmp_path) as log:
        log.write("the file \udcff")
    assert "the file" in (tmp_path / "run.log").read_text()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.log").symlink_to("/dev/full")
    with Log(tmp_path / "full") as log:
        log("a line that the disk does not take")
    assert "a line that" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0\0", "nonsense"])
def test_a_damaged_record_of_a_run_is_named(tmp_path, content):
    file = tmp_path / "summary.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"{file}: damaged .*delete it"):
        recorded(file)


def test_a_file_that_the_disk_does_not_take_is_named(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=str(tmp_path / "summary.json")):
        write_atomically(tmp_path / "summary.json", "text")
    assert not any(tmp_path.iterdir())


def new_run(tmp_path):
    run = tmp_path / "runs" / "one"
    for part in ("checkpoints", "eval", "logs"):
        (run / part).mkdir(parents=True)
    (run / "config.yaml").write_text("a: 1\n")
    return RunFolder(run, "new", os.open(os.devnull, os.O_RDONLY))


def test_a_run_that_is_refused_before_it_has_computed_leaves_no_folder(tmp_path):
    with pytest.raises(UserError), new_run(tmp_path) as folder, resumable(folder):
        raise UserError("the weights are not there")
    assert not folder.path.exists()


def test_a_run_that_is_refused_after_it_has_computed_is_kept(tmp_path):
    with pytest.raises(UserError), new_run(tmp_path) as folder, resumable(folder):
        (folder.checkpoints / "2").mkdir()
        raise UserError("the budget is spent")
    assert folder.config.is_file()


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), Interrupted("stopped after step 2")])
def test_a_run_that_is_stopped_says_the_command_that_goes_on(tmp_path, stopped):
    with (
        pytest.raises(Interrupted, match=rf"fireopd resume {tmp_path}/runs/one$"),
        new_run(tmp_path) as folder,
        resumable(folder),
    ):
        raise stopped
    assert folder.config.is_file()
