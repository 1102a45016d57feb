"""Conversations as users store them, as messages of a chat template.

    text, list of messages, either as JSON text -> conversation -> list[Message]

OpenAI's messages (content in parts or null, tool calls with arguments as JSON text) and ShareGPT's
(`from`, `value`) become role, content, tool_calls, tool_call_id, name and reasoning_content.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.data.files import kind
from fireopd_jax.runtime.limits import parse_json
from fireopd_jax.text.chat import Message

SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Roles of ShareGPT whose name differs from the chat template's."""
CALLS = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")


def conversation(value: Any, where: str) -> list[Message]:
    """Return a text as a user's message, or the messages of a list; `where` begins errors."""
    if isinstance(value, str):
        stored = _stored(value)
        if stored is None:
            check_unicode(value, where)
            return [Message(role="user", content=value)]
        value = stored
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a text or a list of messages, found {kind(value)}")
    return [message(each, f"{where}: message {i}") for i, each in enumerate(value, start=1)]


def holds_messages(value: Any) -> bool:
    """Return whether a value is a list of objects, or such a list as JSON text."""
    if isinstance(value, str):
        return _stored(value) is not None
    return isinstance(value, list) and any(isinstance(each, Mapping) for each in value)


def message(value: Any, where: str) -> Message:
    """Return one message; raise UserError for a role or a content that is not text."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected an object, found {kind(value)}")
    if "from" in value and "role" not in value:
        return _sharegpt(value, where)
    role = value.get("role")
    if not isinstance(role, str):
        found = kind(role) if "role" in value else "none"
        raise UserError(f"{where}: expected a text role, found {found}")
    calls = _tool_calls(value, where)
    made = Message(role=role, content=_content(value, where, optional=bool(calls)))
    if calls:
        made["tool_calls"] = calls
    for key in ("tool_call_id", "name", "reasoning_content"):
        if isinstance(value.get(key), str):
            check_unicode(value[key], where)
            made[key] = value[key]
    check_unicode(made["content"], where)
    return made


def tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """Return the tools of a row, given as a list of objects or as JSON text; None for none."""
    if isinstance(value, str) and value.strip():
        value = _parsed(value, where, "a list of tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise UserError(f"{where}: expected a list of tools, found {kind(value)}")
    return tuple(value)


def check_unicode(text: str, where: str) -> None:
    r"""Raise on an unpaired surrogate, such as JSON's \ud800: tokenizers cannot encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is an unpaired surrogate") from error


def _content(value: Mapping[str, Any], where: str, optional: bool) -> str:
    """Return a message's text; with `optional`, as beside tool calls, null and none are empty."""
    content = value.get("content")
    if content is None and optional:
        return ""
    if isinstance(content, list) and content:
        return "".join(_part(each, f"{where}: part {i}") for i, each in enumerate(content, 1))
    if isinstance(content, str):
        return content
    found = kind(content) if "content" in value else "none"
    raise UserError(f"{where}: expected a text content, found {found}")


def _part(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    named = value.get("type") if isinstance(value, Mapping) else kind(value)
    if named not in TEXT_PARTS or not isinstance(value.get("text"), str):
        raise UserError(f"{where}: expected a part of type text, found {named!r}")
    return value["text"]


def _tool_calls(value: Mapping[str, Any], where: str) -> list[Any]:
    """Return a message's tool calls, with arguments as objects: templates write them as JSON."""
    calls = value.get("tool_calls")
    if not calls and isinstance(value.get("function_call"), Mapping):
        calls = [{"type": "function", "function": value["function_call"]}]
    if isinstance(calls, str):
        calls = _parsed(calls, f"{where}: tool_calls", "a list of calls")
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(each, Mapping) for each in calls):
        raise UserError(f"{where}: tool_calls: expected a list of calls, found {kind(calls)}")
    return [_call(each) for each in calls]


def _call(value: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(value.get("function"), Mapping):
        return {**value, "function": _call(value["function"])}
    arguments = value.get("arguments")
    if not isinstance(arguments, str):
        return value
    try:
        read = parse_json(arguments)
    except ValueError:
        return value
    return {**value, "arguments": read} if isinstance(read, dict) else value


def _sharegpt(value: Mapping[str, Any], where: str) -> Message:
    speaker, text = value["from"], value.get("value")
    if not isinstance(speaker, str) or not isinstance(text, str):
        raise UserError(
            f"{where}: expected texts from and value, found {kind(speaker)} and {kind(text)}"
        )
    check_unicode(text, where)
    made = Message(role=SHAREGPT.get(speaker, speaker), content=text)
    if speaker in CALLS:
        call = _parsed(text, f"{where}: {speaker}", "a call or a list of calls")
        calls = call if isinstance(call, list) else [call]
        made = Message(role="assistant", content="")
        made["tool_calls"] = [{"type": "function", "function": _call(each)} for each in calls]
    return made


def _stored(text: str) -> list[Any] | None:
    """Return the messages that are stored as JSON text; None for any other text."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        value = parse_json(text)
    except ValueError:
        return None
    turns = isinstance(value, list) and all(
        isinstance(each, dict) and ("role" in each or "from" in each) for each in value
    )
    return value if turns else None


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{where}: expected {expected} as JSON: {reason}") from error


def last_turn(messages: Sequence[Message]) -> Message | None:
    """Return the assistant's turn that ends a conversation, if one does."""
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None
