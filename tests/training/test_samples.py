"""Responses that are shown as they come: which, how often, and that they are only text."""

from fireopd_jax.terminal.safe import safe
from fireopd_jax.training.samples import LINES, WIDTH, Samples, shown
from tests.terminal.emulator import Clock


def test_the_first_step_then_where_asked_at_times_apart():
    clock = Clock()
    samples = Samples(clock)
    assert samples.due(asked=False)  # the first of this process
    clock.now = 59.0
    assert not samples.due(asked=True)
    clock.now = 61.0
    assert not samples.due(asked=False)
    assert samples.due(asked=True)
    clock.now = 100.0
    assert not samples.due(asked=True)


def test_a_response_is_a_few_short_lines_without_control_characters():
    prompt = "a" * 500 + "\nWhat is 2 + 2?\x1b[2J"
    response = "\x1b]0;title\x07first\r\n" + "b" * 300 + "\n\n" + "c\n" * 50
    text = shown(prompt, response, ["9 tokens", "wrong"])
    lines = text.split("\n")
    assert lines[0].startswith("  prompt: ... a") and lines[0].endswith(r"\nWhat is 2 + 2?\x1b[2J")
    assert lines[1] == r"  > \x1b]0;title\x07first\r"
    assert lines[2] == f"  > {'b' * WIDTH} ..."
    assert lines[-2] == f"  > ... {3 + 51 - LINES} more lines"
    assert lines[-1] == "  (9 tokens, wrong)"
    assert len(lines) == 1 + LINES + 2 and safe(text) == text
