"""Commands of a chat: `/name arguments`.

A line is a command if its first word is a slash and letters; `/etc/hosts` begins a message.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from fireopd_jax.commands.chat.conversation import Chat
from fireopd_jax.config import UserError, nearest

WORD = re.compile(r"/([A-Za-z?]+)(?:\s+(.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it does with a chat and its argument, and a line of help."""

    call: Callable[[Chat, str], object]
    argument: str
    help: str


class Leave(Exception):
    """Ends the chat."""


def _leave(chat: Chat, argument: str) -> None:
    raise Leave


def _help(chat: Chat, argument: str) -> None:
    names = [f"/{name} {command.argument}".rstrip() for name, command in COMMANDS.items()]
    width = max(map(len, names))
    for name, command in zip(names, COMMANDS.values(), strict=True):
        chat.note(f"{name:{width}}  {command.help}")
    chat.note('A message goes on in the next line after a \\, or between """ and """.')


COMMANDS: Mapping[str, Command] = {
    "help": Command(_help, "", "list these commands"),
    "clear": Command(lambda chat, _: chat.clear(), "", "begin a new conversation"),
    "undo": Command(lambda chat, _: chat.undo(), "", "forget the last message and its answer"),
    "retry": Command(
        lambda chat, _: chat.retry(), "", "answer the last message again, with another seed"
    ),
    "system": Command(
        lambda chat, text: chat.set_system(text),
        "TEXT",
        "the system message from now on; without TEXT there is none",
    ),
    "set": Command(
        lambda chat, words: chat.set(words),
        "temperature=0.2",
        "also top_p, top_k, min_p, max_tokens, seed; alone: show them",
    ),
    "save": Command(
        lambda chat, file: chat.save(file),
        "FILE",
        "write the conversation as JSON lines, which `fireopd data` reads",
    ),
    "exit": Command(_leave, "", "leave, as Ctrl-D"),
}
ALIASES = {"quit": "exit", "bye": "exit", "q": "exit", "?": "help", "reset": "clear"}
WITHOUT_ARGUMENT = [name for name, command in COMMANDS.items() if not command.argument]


def run_command(chat: Chat, line: str) -> bool:
    """Run the command of a line; return False if it is none.

    Raises UserError for an unknown command or a wrong argument, `Leave` for /exit.
    """
    match = WORD.fullmatch(line.strip())
    if match is None:
        return False
    typed, argument = match[1].lower(), (match[2] or "").strip()
    name = ALIASES.get(typed, typed)
    if name not in COMMANDS:
        close = nearest(f"/{typed}", [f"/{name}" for name in COMMANDS])
        raise UserError(f"no command /{typed}{close}; /help lists them")
    if argument and name in WITHOUT_ARGUMENT:
        raise UserError(f"/{name} takes no argument, but there is {argument!r}")
    COMMANDS[name].call(chat, argument)
    return True
