"""Chats as they are seen at 80 columns; the captures in docs/chat.md are these.

FIREOPD_WRITE_DOCS=1 writes them anew.
"""

import os
import re
from pathlib import Path

import pytest

from fireopd_jax.commands.chat.command import talk
from tests.commands.chat_doubles import Scripted, lines, terminal_chat

DOCS = Path(__file__).parents[2] / "docs" / "chat.md"
BEFORE = ("7+8+0=4c1;4+3+1=7c0;74", "5+7+0=2c1;9+2+1=1c1;112")
AFTER = ("7+8+0=5c1;4+3+1=8c0;85", "5+7+0=2c1;9+2+1=2c1;122")
"""Greedy answers of the quickstart's student after 0 and 152 of its 350 steps."""
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def digits(text):
    """Return an answer with a space after each token of the script, for the double to split at."""
    return " ".join(text) + " "  # and the stop token, which has no text


class Digits(Scripted):
    """A speaker whose tokens are characters."""

    def answer(self, prompt, knobs, sample):
        for each in super().answer(prompt, knobs, sample):
            yield type(each)(
                each.text.replace(" ", ""), each.tokens, each.finish, each.first_s, each.seconds
            )


def compared(width, height=24):
    """Return a chat with the student before and after, and what it writes."""
    return terminal_chat(
        Digits(*map(digits, BEFORE), title="before", step_s=0.0041),
        Digits(*map(digits, AFTER), title="after (quickstart)", step_s=0.0040),
        width=width,
        height=height,
        seed=0,
    )


def capture():
    """Return what a person sees of `fireopd chat --compare` at 80 columns."""
    chat, shown = compared(80)
    chat.prepare()
    text = f"$ fireopd chat --compare runs/quickstart --greedy\n{final(shown())}"
    for line in ("47+38", "/clear", "95+27"):
        before = len(shown())
        talk(chat, lines(line))
        text += f">>> {line}\n{final(shown()[before:])}"
    return text


def final(written):
    """Return the lines that remain of what was written: those that were drawn over are gone."""
    rows = [""]
    for piece in re.split(r"(\n|\r|\x1b\[[0-9;?]*[A-Za-z])", written):
        if piece == "\n":
            rows.append("")
        elif piece == "\x1b[1A":  # up, as the live display does before it writes again
            rows.pop()
        elif piece == "\x1b[2K":
            rows[-1] = ""
        elif piece and piece != "\r" and not CODES.fullmatch(piece):
            rows[-1] += piece
    return "\n".join(row.rstrip() for row in rows).rstrip() + "\n"


def test_the_capture_in_the_docs_is_what_is_seen():
    text = DOCS.read_text(encoding="utf-8")
    block = f"<!-- capture -->\n```text\n{capture()}```\n"
    if os.environ.get("FIREOPD_WRITE_DOCS") == "1":
        text = re.sub(r"<!-- capture -->\n```text\n.*?```\n", lambda _: block, text, flags=re.S)
        DOCS.write_text(text, encoding="utf-8")
    assert block in text, "FIREOPD_WRITE_DOCS=1 writes it anew"
    assert all(len(line) <= 80 for line in block.splitlines())


@pytest.mark.parametrize("height", [4, 24])
def test_every_row_is_seen_once_however_low_the_terminal(height):
    words = " ".join(f"w{index}" for index in range(120))
    short = "only this"
    chat, shown = terminal_chat(
        Scripted(words, title="long"), Scripted(short, title="short"), width=70, height=height
    )
    chat.ask("x")
    rows = final(shown()).splitlines()
    left = " ".join(row.split("│")[0].strip() for row in rows[2:])
    assert words in left
    assert sum("only this" in row for row in rows) == 1
    assert "120 tokens" in left


def test_a_narrow_terminal_has_one_below_the_other():
    chat, shown = compared(50)
    chat.ask("47+38")
    text = CODES.sub("", shown())
    assert text.index(f"[before]\n{BEFORE[0]}") < text.index(f"[after (quickstart)]\n{AFTER[0]}")
    assert " │ " not in text and "before: 23 tokens" in text


def test_ctrl_c_ends_both_answers():
    import signal

    one = Scripted("a b c d", title="one")
    two = Scripted("e f g h", title="two")
    one.during = lambda count: count == 2 and signal.raise_signal(signal.SIGINT)
    chat, shown = terminal_chat(one, two)
    chat.ask("x")
    assert chat.turns[0].answers == ["a b c", "e f"]
    assert final(shown()).count("stopped") == 2
