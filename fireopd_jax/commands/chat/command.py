"""The command: models and options to a chat, and its messages one after the other."""

import dataclasses
import secrets
import sys
from collections.abc import Iterator
from typing import Literal

import jax

from fireopd_jax.commands.chat.conversation import Chat
from fireopd_jax.commands.chat.reading import LineOf, message, piped_line, with_editing
from fireopd_jax.commands.chat.settings import Settings
from fireopd_jax.commands.chat.showing import Screen
from fireopd_jax.commands.chat.sides import Side, sides
from fireopd_jax.commands.chat.slash import Leave, run_command
from fireopd_jax.commands.journal import say
from fireopd_jax.config import UserError
from fireopd_jax.data.messages import check_unicode
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.session.chatting import Speaker
from fireopd_jax.session.opening import open_any
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from fireopd_jax.text.clock import now, stopped_kwargs

SEEDS = 10_000
"""Seeds that are drawn where none is given: short enough to be typed again."""


@dataclasses.dataclass(frozen=True)
class ChatCommand:
    """Arguments of the command; their meaning is in its help."""

    model: str | None
    compare: str | None
    name: str
    system: str | None
    chat_template: str | None
    context: int | None
    settings: Settings
    dtype: Literal["float32", "bfloat16"] | None
    tensor: int
    ignore_config_keys: tuple[str, ...]

    def run(self) -> int:
        """Chat until the input ends; return the exit status, 2 if a message got no answer.

        Raises UserError for unknown models, or one without a chat template.
        """
        check_unicode(self.system or "", "--system")
        compile_cache()
        both = sides(self.model, self.compare, self.name)
        only_runs = all(side.is_run for side in both)  # which `open_any` then refuses keys for
        speakers = [self._speaker(side, only_runs or not side.is_run) for side in both]
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        chat = Chat(speakers, Screen(interactive), self.settings, self.system)
        chat.prepare()
        if interactive:
            chat.note(
                f"{' and '.join(each.title for each in speakers)} · context "
                f"{speakers[0].context:,} tokens · {self.settings} · /help lists commands, Ctrl-D "
                "leaves"
            )
        talk(chat, with_editing() if interactive else piped_line)
        return 2 if chat.unanswered and not interactive else 0

    def _speaker(self, side: Side, takes_keys: bool) -> Speaker:
        say(f"loading {side.title}")
        # One conversation needs one replica: further devices would only draw it again.
        mesh = make_mesh(MeshConfig(data=1, tensor=self.tensor), jax.devices())
        keys = self.ignore_config_keys if takes_keys else ()
        # Each run of the device converts all bfloat16 parameters there, at the cost of ten tokens.
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        spec, params, kwargs = open_any(
            side.model, side.name, dtype, replicated(mesh), keys, self.chat_template
        )
        kwargs = stopped_kwargs(spec.tokenizer.chat_template, kwargs, now())
        return Speaker(side.title, spec, params, kwargs, self.context, mesh)


def some_seed() -> int:
    """Return a seed for a chat in which none is given."""
    return secrets.randbelow(SEEDS)


def talk(chat: Chat, line_of: LineOf) -> None:
    """Read messages and commands, and answer them, until the input or the chat ends.

    A mistake is a line. Ctrl-C while a line is typed drops it; twice in a row it leaves.
    """
    with_terminal, asked = chat.screen.interactive, False
    for text in _messages(line_of):
        if text is None:
            if not with_terminal or asked:
                raise KeyboardInterrupt
            chat.note("\nCtrl-C again, Ctrl-D or /exit leaves")
            asked = True
            continue
        asked = False
        try:
            if text.strip() and not run_command(chat, text):
                chat.ask(text)
        except UserError as error:
            chat.note(str(error))
        except Leave:
            return


def _messages(line_of: LineOf) -> Iterator[str | None]:
    """Yield what is typed, None for Ctrl-C, until the end of the input."""
    while True:
        try:
            yield message(line_of)
        except EOFError:
            return
        except KeyboardInterrupt:
            yield None
