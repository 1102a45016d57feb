"""The state of a chat: what was said, how answers are drawn, and what is done with it.

question -> prompt of each speaker -> answers, one step of each in turn -> view, history
"""

import dataclasses
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from fireopd_jax.commands.chat.settings import Settings
from fireopd_jax.commands.chat.showing import Screen, summary
from fireopd_jax.config import UserError
from fireopd_jax.data.messages import check_unicode
from fireopd_jax.rollout.requests import Knobs
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runtime.signals import StopFlag
from fireopd_jax.session.chatting import Answer, Prompt
from fireopd_jax.text.chat import Message

SHOWN = 40
"""Characters of a message that a note repeats."""


@runtime_checkable
class Talks(Protocol):
    """One side of a chat: `session.chatting.Speaker`."""

    title: str
    context: int

    def prompt(
        self, system: Sequence[Message], turns: Sequence[Sequence[Message]], max_tokens: int
    ) -> Prompt:
        """Return a conversation as token ids."""
        ...

    def needs(self, positions: int) -> int | None:
        """Return the size of the cache that must be compiled first, if any."""
        ...

    def prepare(self, positions: int) -> None:
        """Compile it."""
        ...

    def answer(self, prompt: Prompt, knobs: Knobs, sample: int) -> Iterator[Answer]:
        """Yield the answer so far, again and again."""
        ...


@dataclasses.dataclass
class Turn:
    """A message of the user, and what each speaker answered."""

    question: str
    answers: list[str]

    def of(self, side: int) -> list[Message]:
        """Return the turn as one speaker knows it."""
        return [
            Message(role="user", content=self.question),
            Message(role="assistant", content=self.answers[side]),
        ]


class Chat:
    """A conversation with one speaker, or with two that do not hear one another."""

    def __init__(
        self,
        speakers: Sequence[Talks],
        screen: Screen,
        settings: Settings,
        system: str | None = None,
    ):
        self.speakers, self.screen, self.settings = speakers, screen, settings
        self.system = system or None
        self.turns: list[Turn] = []
        self.unanswered = 0
        """Messages that got no answer."""
        self._draws = 0
        self._dropped = [0] * len(speakers)

    def note(self, text: str) -> None:
        """Show a line that no model has written."""
        self.screen.note(text)

    # -- answers

    def prepare(self) -> None:
        """Compile for a short conversation."""
        for speaker in self.speakers:
            self._compile(speaker, 1)

    def ask(self, question: str) -> None:
        """Answer a message; Ctrl-C ends the answer, and what was said until then is kept.

        Raises UserError for a message that has no room, or that the template rejects.
        """
        dropped = list(self._dropped)
        try:
            check_unicode(question, "the message")
            prompts = [self._prompt(side, question) for side in range(len(self.speakers))]
        except UserError:
            self._dropped = dropped
            self.unanswered += 1
            raise
        settings = self.settings
        for speaker, prompt in zip(self.speakers, prompts, strict=True):
            room = min(settings.max_tokens, speaker.context - len(prompt.ids))
            self._compile(speaker, len(prompt.ids) + room)
        sample = seed_for(settings.seed, f"chat {self._draws}") >> 1  # ids have 31 bits
        self._draws += 1
        last: list[Answer | None] = [None] * len(self.speakers)
        streams = [
            speaker.answer(prompt, settings.knobs(), sample)
            for speaker, prompt in zip(self.speakers, prompts, strict=True)
        ]
        view = self.screen.view([speaker.title for speaker in self.speakers])
        with interruptible(self.screen.interactive) as stop, view:
            for side, answer in drawn(streams, view.together):
                last[side] = answer
                view.update(side, answer)
                if stop:
                    break
            for stream in streams:
                stream.close()  # pyright: ignore[reportAttributeAccessIssue]
            view.end([summary(answer, settings.max_tokens) for answer in last])
        if any(answer is not None and answer.tokens for answer in last):
            self.turns.append(Turn(question, ["" if each is None else each.text for each in last]))
        else:
            self.note("stopped before the first token; the message is not kept")

    def _prompt(self, side: int, question: str) -> Prompt:
        """Return the prompt of a speaker; note it where its oldest turns are dropped."""
        system = [Message(role="system", content=self.system)] if self.system else []
        before = self._dropped[side]
        turns = [turn.of(side) for turn in self.turns[before:]]
        turns.append([Message(role="user", content=question)])
        speaker = self.speakers[side]
        prompt = speaker.prompt(system, turns, self.settings.max_tokens)
        if prompt.dropped:
            self._dropped[side] = before + prompt.dropped
            whose = f"{speaker.title}: " if len(self.speakers) > 1 else ""
            self.note(
                f"{whose}the conversation is longer than the context of {speaker.context:,} "
                f"tokens: its oldest {_count(self._dropped[side], 'turn')} are not read any more"
            )
        return prompt

    def _compile(self, speaker: Talks, positions: int) -> None:
        if (size := speaker.needs(positions)) is not None:
            whose = f" {speaker.title}" if len(self.speakers) > 1 else ""
            self.note(f"compiling{whose} for conversations of up to {size:,} tokens")
        speaker.prepare(positions)

    # -- commands

    def clear(self) -> None:
        """Begin a new conversation, with the same system message."""
        self._keep(0)
        self.note("a new conversation")

    def undo(self) -> None:
        """Forget the last message and its answers."""
        question = self._last().question
        self._keep(len(self.turns) - 1)
        self.note(f"forgotten: {_short(question)}")

    def retry(self) -> None:
        """Answer the last message again, with another seed."""
        turn = self._last()
        self._keep(len(self.turns) - 1)
        count = len(self.turns)
        try:
            self.ask(turn.question)
        finally:
            if len(self.turns) == count:  # stopped at once: the old answer stays
                self.turns.append(turn)

    def set_system(self, text: str) -> None:
        """Change the system message from the next answer on."""
        self.system = text or None
        self.note("no system message" if not text else f"system message: {_short(text)}")

    def set(self, words: str) -> None:
        """Change settings, and show them all."""
        before, self.settings = self.settings, self.settings.changed(words)
        if self.settings.seed != before.seed:
            self._draws = 0
        self.note(str(self.settings))

    def save(self, name: str) -> None:
        """Write the conversation of each speaker as a line of a new JSON Lines file.

        Raises UserError where nothing was said, or the file exists or cannot be written.
        """
        if not name:
            raise UserError("/save: expected a file, as in /save chat.jsonl")
        if not self.turns:
            raise UserError("/save: nothing has been said yet")
        file = Path(name).expanduser()
        lines = "".join(json.dumps(line) + "\n" for line in self._saved())
        try:
            with file.open("x", encoding="utf-8") as out:
                out.write(lines)
        except FileExistsError:
            raise UserError(f"/save: {file} exists; expected a new file") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"/save: {file} cannot be written ({reason})") from error
        self.note(f"wrote {_count(len(self.turns), 'turn')} to {file}")

    def _saved(self) -> Iterator[dict[str, object]]:
        system = [Message(role="system", content=self.system)] if self.system else []
        for side, speaker in enumerate(self.speakers):
            turns = [message for turn in self.turns for message in turn.of(side)]
            yield {"messages": [*system, *turns], "model": speaker.title}

    def _last(self) -> Turn:
        if not self.turns:
            raise UserError("nothing has been said yet")
        return self.turns[-1]

    def _keep(self, count: int) -> None:
        del self.turns[count:]
        self._dropped = [0] * len(self.speakers)


def drawn(streams: Sequence[Iterator[Answer]], together: bool) -> Iterator[tuple[int, Answer]]:
    """Yield (side, answer so far): a step of each in turn, or one side after the other."""
    waiting = list(enumerate(streams))
    while waiting:
        for each in list(waiting) if together else waiting[:1]:
            answer = next(each[1], None)
            if answer is None:
                waiting.remove(each)
            else:
                yield each[0], answer


@contextmanager
def interruptible(interactive: bool) -> Iterator[StopFlag]:
    """Catch the first Ctrl-C inside the block as a flag; a second one raises KeyboardInterrupt.

    Without a terminal, or outside the main thread, the first one raises.
    """
    flag = StopFlag()
    if not interactive or threading.current_thread() is not threading.main_thread():
        yield flag
        return
    old = signal.signal(signal.SIGINT, flag)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, old)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"
