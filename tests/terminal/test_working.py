"""What takes long is said as it begins, and again while it lasts."""

import pytest

from fireopd_jax.terminal import progress as progress_module
from fireopd_jax.terminal import working as module
from fireopd_jax.terminal.record import attach
from fireopd_jax.terminal.working import working
from tests.terminal.emulator import Clock


class Idle:
    """A thread that does nothing: the test calls what it would call."""

    def __init__(self, target, **_):
        self.target = target

    def start(self):
        pass

    def join(self):
        pass


@pytest.fixture
def by_hand(monkeypatch):
    monkeypatch.setattr(module.threading, "Thread", Idle)
    monkeypatch.setattr(progress_module, "time_of_day", lambda: "12:00:00")


def test_it_is_said_at_once_then_every_half_minute_then_at_the_end(by_hand, capsys, monkeypatch):
    clock, kept, works = Clock(), [], []
    made = module._Work

    def watched(*arguments):
        works.append(made(*arguments))
        return works[-1]

    monkeypatch.setattr(module, "_Work", watched)
    with (
        attach(lambda when, text: kept.append(text)),
        working("loading m", interactive=False, clock=clock),
    ):
        assert kept == ["loading m"]
        for now in (10.0, 29.9, 30.0, 45.0, 61.0):
            clock.now = now
            works[0].say_if_due()
    assert kept == [
        "loading m",
        "loading m, 0:30 so far",
        "loading m, 1:01 so far",
        "loading m: done in 61.0 s",
    ]
    assert capsys.readouterr().err.splitlines() == [f"12:00:00 {line}" for line in kept]


def test_what_is_quick_as_a_rule_says_nothing(by_hand, capsys):
    clock = Clock()
    with working("saving", after=2.0, interactive=False, clock=clock):
        clock.now = 1.0
    assert capsys.readouterr().err == ""


def test_what_fails_is_not_said_to_be_done(by_hand, capsys):
    clock = Clock()
    with pytest.raises(KeyError), working("loading", interactive=False, clock=clock):
        clock.now = 5.0
        raise KeyError
    assert capsys.readouterr().err == "12:00:00 loading\n"


def test_the_thread_says_what_is_due(capsys, monkeypatch):
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    said = []
    monkeypatch.setattr(module, "plain_line", lambda text, shown: said.append(text))
    with working("compiling", interactive=False):
        while len(said) < 3:
            module.time.sleep(0.01)
    assert said[0] == "compiling" and said[1].endswith("so far")
