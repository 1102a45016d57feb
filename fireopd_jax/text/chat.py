"""Conversations to token ids and back, with the tokenizer's chat template.

    conversation, tools -> template -> text -> prompt_ids -> [sampler] -> decode -> text
    reference text -> response_ids

A prompt ends with the header of the assistant's turn. A response contains none of the template's
special tokens, except the end-of-sequence token.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from fireopd_jax.config import UserError
from fireopd_jax.runtime.limits import TooLong, TooMuch, at_most
from fireopd_jax.text.chat_templates import chat_template, key_of, named
from fireopd_jax.text.clock import CLOCK, DATES, moment_of, stopped

STOP_SLOTS = 8
"""Maximum number of stop ids: the size of the sampler's static array of them."""
FIXED_ARGUMENTS = (
    "conversation",
    "messages",
    "tools",
    "add_generation_prompt",
    "tokenize",
    "return_dict",
    "padding",
)
FIRST_S, EACH_S = 30.0, 0.1
"""Seconds that a template may take, and those for each conversation: thousand times the usual."""
FIRST_BYTES, EACH_BYTES = 2.0**31, 2.0**20
"""Memory that a template may take, likewise."""
LONGEST_TEXT = 2**27
SHOWN = 300
"""Longest reason of a template that is shown."""
SURROGATE = re.compile("[\ud800-\udfff]")
Tools = Sequence[Mapping[str, Any]]
Turns = list[dict[str, Any]]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    template_kwargs: Mapping[str, Any],
    *,
    begun: Sequence[str] | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Tools | None] | None = None,
    origins: Sequence[str] | None = None,
    model: str = "",
) -> list[list[int]]:
    """Return the token ids of each conversation, up to the first token of the response.

    `tools` are those of each conversation. `begun` are beginnings of the responses, verbatim, which
    the ids then include. They follow the header of the assistant's turn as that of a new response:
    a template may render a finished message otherwise, without its reasoning or surrounding spaces.
    Without `add_generation_prompt` the ids have no such header. The argument `strftime_now` of a
    template, an ISO date, is what its clock shows; by default it shows the time.

    Raises `UserError` if the template is missing, rejects a conversation, or ignores its tools or
    messages: it names `model` and the conversation by its entry of `origins`, such as "p.jsonl:3".
    """
    check_template(tokenizer, template_kwargs, model)
    if not conversations:
        return []
    chats = Chats(
        [[_as_read(turn) for turn in conversation] for conversation in conversations],
        [
            list(map(dict, offered)) if offered else None
            for offered in tools or [None] * len(conversations)
        ],
        origins or [f"prompt {i + 1}" for i in range(len(conversations))],
    )
    writer = Writer(tokenizer, template_kwargs, add_generation_prompt, model)
    texts = writer.written(chats)
    writer.check_tools(chats, texts)
    writer.check_messages(chats, texts)
    if begun is not None:
        texts = [text + start for text, start in zip(texts, begun, strict=True)]
    for text, origin in zip(texts, chats.origins, strict=True):
        if SURROGATE.search(text):
            raise UserError(f"{origin}: {writer.name} writes an unpaired surrogate")
    ids = tokenizer(texts, add_special_tokens=False, padding=False)["input_ids"]
    for row, origin in zip(ids, chats.origins, strict=True):  # pyright: ignore[reportArgumentType]
        if not row:
            raise UserError(f"{origin}: {writer.name} writes nothing for this prompt")
    return [list(row) for row in ids]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]


@dataclasses.dataclass(frozen=True)
class Chats:
    """Conversations as a template reads them, with their tools and origins."""

    turns: Sequence[Turns]
    tools: Sequence[list | None]
    origins: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Writer:
    """A chat template with its arguments."""

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    header: bool
    model: str

    @property
    def name(self) -> str:
        """The template in errors: "the chat template of teacher math"."""
        return f"the chat template of {named(self.model)}"

    def written(self, chats: Chats) -> list[str]:
        """Return the texts; conversations with the same tools are rendered in one call.

        Raises UserError for the first one that the template raises for, whatever it raises.
        """
        groups: dict[str, list[int]] = {}
        for i, tools in enumerate(chats.tools):
            key = "" if tools is None else json.dumps(tools, default=repr)
            groups.setdefault(key, []).append(i)
        texts = [""] * len(chats.turns)
        for own in groups.values():
            try:
                rendered = self._render([chats.turns[i] for i in own], chats.tools[own[0]])
            except Exception as error:
                raise self._refusal(error, chats, own) from error
            for i, text in zip(own, rendered, strict=True):
                texts[i] = text
        return texts

    def check_tools(self, chats: Chats, texts: Sequence[str]) -> None:
        """Raise UserError for tools, or calls of them, without which the text would be the same."""
        calling = [any("tool_calls" in turn for turn in turns) for turns in chats.turns]
        for what, having in (("tools", [bool(t) for t in chats.tools]), ("tool_calls", calling)):
            if not any(having):
                continue
            i = having.index(True)
            turns, tools = chats.turns[i], chats.tools[i]
            if what == "tools":
                tools = None
            else:
                turns = [{k: v for k, v in turn.items() if k != what} for turn in turns]
            try:
                (without,) = self._render([turns], tools)
            except Exception:  # A template that needs them does not ignore them.
                continue
            if without == texts[i]:
                raise UserError(
                    f"{chats.origins[i]}: {self.name} ignores the {what} of this prompt; expected "
                    f"a template that writes them ({key_of(self.model)}), or rows without them"
                )

    def check_messages(self, chats: Chats, texts: Sequence[str]) -> None:
        """Raise UserError for one text of all conversations, though their messages differ."""
        said = {tuple(str(turn.get("content")).strip() for turn in turns) for turns in chats.turns}
        if len(said) > 1 and len(set(texts)) == 1:
            raise UserError(
                f"{self.name} writes the same text for all {len(texts)} prompts, "
                f"{texts[0][:SHOWN]!r}; expected one that writes messages ({key_of(self.model)})"
            )

    def _render(self, turns: Sequence[Turns], tools: list | None) -> list[str]:
        template = chat_template(self.tokenizer, self.model, tools)
        kwargs = dict(self.kwargs)
        if (moment := kwargs.pop(CLOCK, None)) is not None:
            more = tuple(value for value in kwargs.values() if isinstance(value, str))
            template, kwargs[DATES] = stopped(template, moment_of(moment), more)
        count = len(turns)
        with at_most(FIRST_S + EACH_S * count, FIRST_BYTES + EACH_BYTES * count):
            _bound_output(template)
            texts = self.tokenizer.apply_chat_template(
                list(turns),  # pyright: ignore[reportArgumentType]
                tools=tools,  # pyright: ignore[reportArgumentType]
                chat_template=template,
                add_generation_prompt=self.header,
                tokenize=False,
                **kwargs,
            )
        assert isinstance(texts, list)
        if any(len(str(text)) > LONGEST_TEXT for text in texts):
            raise UserError(f"{self.name} writes over {LONGEST_TEXT:,} characters for a prompt")
        return texts  # pyright: ignore[reportReturnType]

    def _refusal(self, error: Exception, chats: Chats, indices: Sequence[int]) -> UserError:
        """Return the error for the first of the conversations that the template raises for."""
        if isinstance(error, UserError):
            return error
        if isinstance(error, TooLong):
            ends = "writes without end" if isinstance(error, TooMuch) else "does not end"
            return UserError(f"{self.name} {ends}; expected another ({key_of(self.model)})")
        if isinstance(error, TemplateSyntaxError):
            line = error.lineno - (CLOCK in self.kwargs)
            return UserError(f"{self.name} is not valid Jinja: line {line}: {_reason(error)}")
        for i in indices:
            try:
                self._render([chats.turns[i]], chats.tools[i])
            except Exception as own:
                where = chats.origins[i]
                return UserError(f"{where}: {self.name} rejects this prompt: {_reason(own)}")
        return UserError(f"{self.name} rejects the prompts: {_reason(error)}")


def _bound_output(template: str) -> None:
    """Make the compiled template raise `TooMuch` before its parts are joined to too long a text.

    Joining is one call, which no limit of time or memory can end.
    """
    # Cached there by the text of the template. Without it the text is measured afterwards only.
    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled is not None:
        compiled(template).environment.concat = _joined


def _joined(parts: Iterable[str]) -> str:
    kept, size = [], 0
    for part in parts:
        kept.append(part)
        size += len(part)
        if size > LONGEST_TEXT:
            raise TooMuch
    return "".join(kept)


def _reason(error: Exception) -> str:
    """Return what a template says, or the kind of the error of its code."""
    text = " ".join(str(error).split())[:SHOWN]
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__}: {text}"


def _as_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates read it, without fields that are empty."""
    return {key: value for key, value in message.items() if value not in (None, [], ())}


def check_template(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], model: str = ""
) -> None:
    """Raise on a missing template, or on an argument that the template would silently ignore."""
    chat_template(tokenizer, model)
    templates = str(tokenizer.chat_template)  # All of them: rows with tools may have another.
    for name in template_kwargs:
        if name in FIXED_ARGUMENTS:
            raise UserError(f"chat_template_kwargs: {name!r} is set by fireopd and cannot be given")
        if not re.search(rf"\b{re.escape(name)}\b", templates):
            raise UserError(
                f"chat_template_kwargs: the chat template of {tokenizer.name_or_path!r} "
                f"does not use {name!r}"
            )


def response_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of responses, each followed by the end-of-sequence token."""
    end = stop_ids(tokenizer)[0]
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*row, end] for row in ids]  # pyright: ignore[reportGeneralTypeIssues]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens."""
    text = tokenizer.decode(
        [int(token) for token in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def settled(text: str) -> str:
    """Return the text of a response so far without the beginning of a character at its end."""
    return text.rstrip("\ufffd")


def stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation: Mapping[str, Any] | None = None,
    rows: int | None = None,
) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's, then those of a generation config.

    References end with the first one. Raises `UserError` without one, with over `STOP_SLOTS`, or
    for one that is none of the head's `rows`, so that no response could end with it.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
    others = (generation or {}).get("eos_token_id")
    listed = others if isinstance(others, list) else [] if others is None else [others]
    known = all(type(each) is int and each >= 0 for each in listed)
    ids = tuple(dict.fromkeys([end, *listed])) if known else ()
    if not known or len(ids) > STOP_SLOTS:
        raise UserError(
            f"generation_config.json: eos_token_id is {others!r}; expected at most "
            f"{STOP_SLOTS} token ids in all"
        )
    if rows is not None and max(ids) >= rows:
        named = "generation_config.json (or config.json): eos_token_id"
        if end >= rows:
            named = f"tokenizer {tokenizer.name_or_path!r}: its EOS token {tokenizer.eos_token!r}"
        raise UserError(
            f"{named} has the id {next(i for i in ids if i >= rows)}, outside the vocabulary of "
            f"{rows} ids: no response could end with it"
        )
    return ids
