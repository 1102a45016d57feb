"""Printing never fails: readers and terminals that go away, closed streams, narrow encodings."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from fireopd_jax.terminal.curves import curve
from fireopd_jax.terminal.streams import (
    READER_GONE,
    Guarded,
    OutputLost,
    flush_streams,
    guarded_streams,
)
from fireopd_jax.terminal.tables import table

PRINTING = """
import sys
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.streams import guarded_streams
from fireopd_jax.terminal.tables import table
with guarded_streams():
    for step in range(3000):
        print("step", step, "\\u00b1 \\u2502 \\u4f60\\u597d \\ud800", flush=True)
        print("progress", step, file=sys.stderr)
    table([("0.5 \\u00b1 0.1", 3)], ("model", "n"), title="\\u2502")
    with progress("distil", 2, interactive=True) as advance:
        advance(1, kl=0.1)
    open(sys.argv[1], "w").write("summary")
"""


def dead_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def dead_terminal():
    master, slave = pty.openpty()
    os.close(master)
    return os.fdopen(slave, "w")


@pytest.mark.parametrize("dead", [dead_pipe, dead_terminal])
def test_what_is_printed_to_nobody_is_dropped(dead):
    stream = Guarded(dead())
    for _ in range(3):
        assert stream.write("text") == 4
        stream.flush()
    assert stream.gone and not stream.isatty()
    stream.stream.close()  # what its buffer held has gone to /dev/null


@pytest.mark.parametrize("dead", [dead_pipe, dead_terminal])
def test_a_command_whose_output_nobody_reads_ends_quietly(dead):
    stream = Guarded(dead(), product=True)
    stream.write("text")
    with pytest.raises(SystemExit) as ended:
        stream.flush()
    assert ended.value.code == READER_GONE
    stream.stream.close()


def test_an_output_that_is_not_written_whole_is_no_success(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputLost, match="No space left"), guarded_streams(product=True):
            print("half of it")
            flush_streams()
        with guarded_streams():
            print("a report", flush=True)
            flush_streams()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_outside_the_encoding_are_replaced(encoding):
    below = io.BytesIO()
    stream = Guarded(io.TextIOWrapper(below, encoding=encoding))
    stream.write("0.5 ± 0.1 你好 \ud800 │\n")
    Console(file=stream).print("│ ± 你好")  # pyright: ignore[reportArgumentType]
    stream.write(curve([(0, 0.1), (5, 0.2)], "KL"))
    stream.flush()
    assert below.getvalue().startswith(b"0.5 ") and b"?" in below.getvalue()


def test_streams_are_given_back(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    with guarded_streams():
        print("a")
        table([(1,)], ("n",))
    assert sys.stdout is text and text.getvalue().startswith("a\n")


def test_a_closed_standard_input_is_at_its_end(tmp_path):
    code = (
        "import sys; from fireopd_jax.terminal.streams import guarded_streams\n"
        "with guarded_streams(): assert sys.stdin.buffer.read() == b'' and not sys.stdin.isatty()"
    )
    shell = f'"{sys.executable}" -c "$CODE" <&-'
    subprocess.run(["bash", "-c", shell], env={**os.environ, "CODE": code}, check=True)


@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full", "| head -1"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_process_prints_into_anything_and_ends_well(tmp_path, how, encoding):
    script, out = tmp_path / "prints.py", tmp_path / "summary"
    script.write_text(PRINTING)
    shell = f'set -o pipefail; "{sys.executable}" {script} {out} {how}'
    done = subprocess.run(
        ["bash", "-c", shell],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0 and out.read_text() == "summary"
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
