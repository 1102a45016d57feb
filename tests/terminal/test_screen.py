"""The live line of a terminal: one line, whatever happens; and when there is one at all."""

import io

import pytest
from rich.console import Console

from fireopd_jax.terminal.interrupts import ERASED
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.record import attach
from fireopd_jax.terminal.screen import Screen, is_live
from fireopd_jax.terminal.working import working
from tests.terminal.emulator import Clock, Terminal


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def made(width):
    written = io.StringIO()
    return written, Screen(Console(file=written, width=width, force_terminal=True))


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_nothing_wraps_and_nothing_is_left_behind(width):
    clock, (written, screen) = Clock(), made(width)
    with progress("distil student", 50, interactive=True, clock=clock, on=screen) as advance:
        for step in range(50):
            clock.now += 2.0
            advance(1, kl=step / 7, length=40.0 + step, **{"tok/s": 812.5})
            if step == 20:
                with working("evaluating", interactive=True, clock=clock, on=screen):
                    screen.refresh()
            screen.refresh()
    terminal = Terminal(width).feed(written.getvalue())
    assert terminal.overruns == 0 and terminal.cursor_shown
    [line] = terminal.text().splitlines()  # the last one stays
    assert "50/50" in line


def test_a_line_is_erased_and_drawn_in_one_write():
    clock, (_, screen) = Clock(), made(80)
    writes = []
    screen.console.file = Stream(True)
    screen.console.file.write = writes.append
    with progress("train", 9, interactive=True, clock=clock, on=screen) as advance:
        advance(1)
        screen.refresh()
        erasing = [text for text in writes if "\x1b[2K" in text]
    assert erasing and all("train" in text.rpartition("\x1b[2K")[2] for text in erasing)


def test_a_terminal_that_is_resized_gets_lines_of_its_new_width():
    clock, (written, screen) = Clock(), made(100)
    with progress("distil student", 50, interactive=True, clock=clock, on=screen) as advance:
        advance(1, kl=0.5, length=10.5)
        screen.refresh()
        for width in (30, 64):
            written.seek(0)
            written.truncate()
            screen.console.width = width
            screen.refresh()
            terminal = Terminal(width).feed(written.getvalue())
            assert terminal.overruns == 0 and "1/50" in terminal.text()


def test_what_goes_on_inside_a_loop_is_shown_beside_its_count():
    clock, (written, screen) = Clock(), made(80)
    with (
        progress("distil student", 50, interactive=True, clock=clock, on=screen) as advance,
    ):
        advance(1)
        with working("compiling the update", interactive=True, clock=clock, on=screen):
            clock.now += 65
            screen.refresh()
            text = Terminal(80).feed(written.getvalue()).text()
    assert text == "distil student 1/50  ⠋ compiling the update  1:05"


def test_the_log_has_plain_lines_while_the_line_is_live():
    clock, kept, (_, screen) = Clock(), [], made(80)
    with (
        attach(lambda when, text: kept.append(text)),
        progress("train", 100, interactive=True, clock=clock, on=screen) as advance,
    ):
        for _ in range(25):
            clock.now += 1.0
            advance(1)
        with working("saving", interactive=True, clock=clock, on=screen):
            clock.now += 3
    assert [line.split(",")[0] for line in kept] == [
        "train 1/100 1%",
        "train 11/100 11%",
        "train 21/100 21%",
        "saving",
        "saving: done in 3.0 s",
        "train 25/100 25%",
    ]


def test_the_answer_to_a_signal_replaces_the_line_which_is_drawn_below():
    clock, (written, screen) = Clock(), made(80)
    with progress("train", 9, interactive=True, clock=clock, on=screen) as advance:
        advance(1)
        screen.refresh()
        written.write(f"{ERASED}Ctrl-C: stopping\n")  # as the handler does, past all buffers
        screen.refresh()
        text = Terminal(80).feed(written.getvalue()).text()
    assert text.splitlines()[0] == "Ctrl-C: stopping"
    assert text.splitlines()[1].startswith("train  1/9") and len(text.splitlines()) == 2


def test_a_terminal_without_unicode_gets_ascii():
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    screen = Screen(Console(file=raw, width=100, force_terminal=True))
    clock = Clock()
    with progress("train", 4, interactive=True, clock=clock, on=screen) as advance:
        advance(2)
        with working("saving", interactive=True, clock=clock, on=screen):
            screen.refresh()
    raw.flush()
    shown = raw.buffer.getvalue()
    assert shown.isascii() and b"#" in shown and b"| saving" in shown


@pytest.mark.parametrize(
    "terminal, environment, live",
    [
        (True, {"TERM": "xterm-256color"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "CI": "true"}, False),
        (True, {"TERM": "xterm", "CI": "false"}, True),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_a_line_is_live_on_terminals_only(monkeypatch, terminal, environment, live):
    for name in ("TERM", "CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_live(Stream(terminal)) == live


def test_a_closed_stream_is_no_terminal():
    closed = io.StringIO()
    closed.close()
    assert not is_live(closed) and not is_live(None)


def test_no_colour_is_written_where_none_is_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    clock, (written, screen) = Clock(), made(80)
    with progress("train", 4, interactive=True, clock=clock, on=screen) as advance:
        advance(2)
        screen.refresh()
    assert "\x1b[36m" not in written.getvalue() and "2/4" in written.getvalue()
