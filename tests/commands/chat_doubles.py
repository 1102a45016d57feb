"""Speakers that say what a test wrote down, and a screen whose output a test can read."""

import io

import numpy as np
from rich.console import Console

from fireopd_jax.commands.chat.conversation import Chat
from fireopd_jax.commands.chat.settings import Settings
from fireopd_jax.commands.chat.showing import Screen
from fireopd_jax.session.chatting import Answer, Prompt


class Scripted:
    """Answers from a list, a word a step; a token is a word, `step_s` its time."""

    def __init__(self, *answers, title="scripted", context=4096, step_s=0.01, during=None):
        self.title, self.context, self.step_s = title, context, step_s
        self.answers, self.during = list(answers), during
        self.seen, self.samples, self.knobs, self.prepared = [], [], [], []

    def prompt(self, system, turns, max_tokens):
        messages = [*system, *(message for turn in turns for message in turn)]
        self.seen.append([(each["role"], each["content"]) for each in messages])
        return Prompt(ids=np.zeros(len(messages), np.int32), dropped=0)

    def needs(self, positions):
        return None if self.prepared else 1024

    def prepare(self, positions):
        self.prepared.append(positions)

    def answer(self, prompt, knobs, sample):
        self.samples.append(sample)
        self.knobs.append(knobs)
        words = self.answers[(len(self.samples) - 1) % len(self.answers)].split(" ")
        limited = words[: knobs.max_tokens]
        for count in range(1, len(limited) + 1):
            over = "length" if len(limited) < len(words) else "stop"
            finish = "running" if count < len(limited) else over
            text = " ".join(limited[:count])
            first = 10 * self.step_s
            yield Answer(text, count, finish, first, first + (count - 1) * self.step_s)
            if self.during is not None:
                self.during(count)


def terminal_chat(*speakers, width=80, height=24, **settings):
    """Return a chat on a terminal, and the function that returns what was written to it."""
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=True,
        width=width,
        height=height,
        color_system=None,
        highlight=False,
    )
    chat = Chat(list(speakers), Screen(True, console), Settings(**settings))
    return chat, out.getvalue


def lines(*texts):
    """Return a function that reads these lines; an exception among them is raised."""
    waiting = list(texts)

    def line_of(prompt):
        if not waiting:
            raise EOFError
        text = waiting.pop(0)
        if isinstance(text, BaseException):
            raise text
        return text

    return line_of
