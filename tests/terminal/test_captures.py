"""The captures in docs/terminal.md are what the terminal shows.

FIREOPD_WRITE_DOCS=1 writes them anew.
"""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from fireopd_jax.session.session import scores
from fireopd_jax.terminal import progress as progress_module
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.record import say
from fireopd_jax.terminal.screen import Screen
from fireopd_jax.terminal.working import working
from fireopd_jax.training.samples import shown
from tests.terminal.emulator import Clock, Terminal

DOCS = Path(__file__).parents[2] / "docs" / "terminal.md"
FIGURES = {
    "avg@8": 0.347,
    "interval_95": 0.031,
    "problems": 256,
    "mean_length": 7.9,
    "finished": 0.98,
}
WRITES = os.environ.get("FIREOPD_WRITE_DOCS") == "1"


def compare(name, text):
    """Compare a capture with the one in the docs, or write it there."""
    docs = DOCS.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- capture: {name} -->\n```text\n)(.*?)(\n```\n)", re.DOTALL)
    assert len(block.findall(docs)) == 1, f"docs/terminal.md has no capture {name}"
    if WRITES:
        docs = block.sub(lambda found: found[1] + text + found[3], docs)
        DOCS.write_text(docs, encoding="utf-8")
    [(_, written, _)] = block.findall(docs)
    assert written == text, f"docs/terminal.md: {name} differs; FIREOPD_WRITE_DOCS=1 writes it anew"


def told():
    """Print what the log of a run prints by its first steps."""
    say("fireopd 0.1.0.dev0, jax 0.10.2, 1 × cpu (2 cores, 24 GiB)")
    say("writing runs/quickstart")
    say(f"{scores('student_before', FIGURES)}, 12.3 s")
    sample = shown("57+65", "57+65=132\n132", ["10 tokens", "wrong", "teacher -1.94 nats a token"])
    say(f"student: a response of step 1:\n{sample}")


def steps(clock, advance, count, pause=lambda: None):
    """Advance a loop; its first step compiles for half a minute."""
    for step in range(count):
        clock.now += 2.6 if step else 31.0
        values = {"kl": 0.25 / (step + 1), "length": 7.9 + step / 8}
        advance(1, **values, **{"tok/s": 812.0 + step})
        pause()


def live(width):
    """Return the screens of a live display: in a step, in an evaluation, at the end."""
    clock, written = Clock(), io.StringIO()
    screen = Screen(Console(file=written, width=width, force_terminal=True))

    def seen():
        screen.refresh()
        terminal = Terminal(width).feed(written.getvalue())
        assert terminal.overruns == 0
        return terminal.text()

    screens = []
    with (
        contextlib.redirect_stdout(screen.console.file),
        progress("distil student", 14, interactive=True, clock=clock, on=screen) as advance,
    ):
        with working("compiling the update", interactive=True, clock=clock, on=screen):
            clock.now += 18.5
            screens.append(seen())
        with contextlib.redirect_stdout(io.StringIO()) as out:
            told()
        for line in out.getvalue().splitlines():
            screen.console.print(line, markup=False, highlight=False, emoji=False)
        steps(clock, advance, 12)
        screens.append(seen())
        with working("evaluating student after 12 steps", interactive=True, clock=clock, on=screen):
            clock.now += 4
            screens.append(seen().splitlines()[-1])
        for _ in range(2):
            clock.now += 2.6
            advance(1, kl=0.018, length=9.5, **{"tok/s": 826.0})
    screens.append(Terminal(width).feed(written.getvalue()).text().splitlines()[-1])
    return screens


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_live_display(width):
    first, running, evaluating, last = live(width)
    compare(f"live-{width}", "\n\n".join([first, running, evaluating, last]))


def test_plain_lines(monkeypatch, capsys):
    clock = Clock()

    def time_of_day():
        minutes, seconds = divmod(int(clock.now), 60)
        return f"14:{minutes:02}:{seconds:02}"

    monkeypatch.setattr(progress_module, "time_of_day", time_of_day)
    screens = []

    def now():
        captured = capsys.readouterr()
        screens.append(captured.out + captured.err)

    told()
    now()
    with progress("distil student", 14, interactive=False, clock=clock) as advance:
        with working("compiling the update", interactive=False, clock=clock):
            clock.now += 28.5
        steps(clock, advance, 12)
        for _ in range(2):
            clock.now += 2.6
            advance(1, kl=0.018, length=9.5, **{"tok/s": 826.0})
    now()
    compare("plain", "".join(screens).rstrip("\n"))
