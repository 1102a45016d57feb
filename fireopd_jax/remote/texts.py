"""Continuations of partial responses, sampled by a served teacher.

    messages, partial response -> form that the server supports -> n texts

Forms: token ids or text to /completions (bare: to a server that may put special tokens before it);
a chat that ends with the partial message (trailing: without a flag); a chat that asks in words.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from fireopd_jax.config import UserError
from fireopd_jax.remote.client import Client, Request
from fireopd_jax.remote.errors import Malformed, Refused

Form = Literal["ids", "prefill", "trailing", "text", "bare_text", "instruction"]
Limit = Literal["max_tokens", "max_completion_tokens"]

FORMS: Mapping[str, tuple[Form, ...]] = {
    "auto": ("ids", "prefill", "text", "bare_text", "instruction"),
    "completions": ("ids", "text", "bare_text"),
    "prefill": ("prefill", "trailing"),
    "instruction": ("instruction",),
}
"""Setting -> forms in the order of preference."""
ROUNDS = 4
"""Times that missing samples are asked for."""
ECHO = 24
"""Characters from which on a repeated end of the prefix is an echo, not the continuation."""
TURN_TOKENS = 32
"""Most tokens that a chat template adds to a message."""


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A conversation and the beginning of the assistant's answer."""

    messages: Sequence[Mapping[str, Any]]
    partial: str
    """The response so far, as text without special tokens."""
    token_ids: Sequence[int] | None = None
    """Prompt and partial response in the teacher's own template and vocabulary, if known."""
    text: str | None = None
    """The same as text with special tokens, if known."""
    seed: int = 0
    """Sample id: equal prefixes of different samples have independent continuations."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Tools that the conversation offers."""


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """What a server supports, found once at the start."""

    form: Form
    samples: int | None
    """Most samples in one request; None for any number."""
    seeds: bool
    """Whether requests carry a seed."""
    limit: Limit
    """Name of the field with the longest completion."""


def text_features(client: Client, example: Prefix) -> TextFeatures:
    """Return what the server supports, by requests of one token each that continue `example`.

    Raises the server's last refusal if it supports no form that the settings allow.
    """
    setting = client.settings.continuation
    refused = UserError(
        f"{client.label}: continuation={setting} needs the prompt's token ids or its text"
    )
    for form in FORMS[setting]:
        if not _known(form, example):
            continue
        try:
            features = _supported(client, example, form)
        except Refused as error:
            if error.is_final:
                raise
            refused = error
            continue
        if setting != "auto" or form != "prefill" or _is_prefilled(client, example, features):
            client.log(f"{client.label}: continuations by {_described(features)}")
            return features
    raise refused


def continuations(
    client: Client,
    features: TextFeatures,
    prefixes: Sequence[Prefix],
    n: int,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    kind: str = "texts",
) -> list[list[str]]:
    """Return exactly n continuations of each prefix, each of at most `max_tokens` tokens.

    Shorter prefixes are sent first, since a server reuses what it computed for the beginning of a
    longer one. Samples that are missing are asked for again; `UserError` if they stay missing.
    Empty texts are counted, and are valid. Equal arguments return the cached texts of before, but
    with `kind` `probe` the server is asked.
    """
    found: list[list[str]] = [[] for _ in prefixes]
    order = sorted(range(len(prefixes)), key=lambda i: (_length(prefixes[i]), i))
    sampling = {"temperature": temperature, **({"top_p": top_p} if top_p < 1 else {})}
    for turn in range(ROUNDS):
        asked: list[tuple[int, int]] = []
        requests = []
        for i in order:
            for start in range(len(found[i]), n, features.samples or n):
                size = min(features.samples or n, n - start)
                sample = f"{seed} {prefixes[i].seed} {turn} {start}"
                asked.append((i, size))
                request = _request(
                    client, features, prefixes[i], size, max_tokens, sampling, sample
                )
                requests.append(dataclasses.replace(request, kind=kind))
        for (i, size), texts in zip(asked, client.ask(requests), strict=True):
            client.count("short_answers", int(len(texts) < size))
            found[i] += [_continued(client, features, prefixes[i], text) for text in texts[:size]]
        if all(len(texts) == n for texts in found):
            return found
    short = next(i for i in order if len(found[i]) < n)
    raise UserError(
        f"{client.label}: {len(found[short])} of {n} continuations after {ROUNDS} requests for a "
        f"prefix of {len(prefixes[short].partial)} characters; fewer are not disagreement, so the "
        "step cannot go on (samples_per_request=1 asks for each alone)"
    )


def _known(form: Form, prefix: Prefix) -> bool:
    """Return whether the prefix has what the form sends."""
    needs = {"ids": prefix.token_ids, "text": prefix.text, "bare_text": prefix.text}
    return needs.get(form, "") is not None


def _supported(client: Client, example: Prefix, form: Form) -> TextFeatures:
    """Return the features of a form; raise `Refused` if the server refuses all of its spellings."""
    setting = client.settings.samples_per_request
    limits: tuple[Limit, ...] = ("max_tokens", "max_completion_tokens")
    if form in ("ids", "text", "bare_text"):
        limits = ("max_tokens",)
    wanted = 2 if setting == "auto" else 1
    spellings: Iterator[tuple[int, bool, Limit]] = (
        (n, seeds, limit)
        for n in sorted({1, wanted}, reverse=True)
        for seeds in (True, False)
        for limit in limits
    )
    refused = None
    for n, seeds, limit in spellings:
        features = TextFeatures(form, None, seeds, limit)
        try:
            texts = client.probe(_request(client, features, example, n, 1, {}, "probe"))
        except Refused as error:
            if error.is_final:
                raise
            refused = refused or error
            continue
        # A server that does not know `n` may ignore it.
        samples = setting if setting != "auto" else None if len(texts) > 1 else 1
        return dataclasses.replace(features, samples=samples)
    assert refused is not None
    raise refused


def _is_prefilled(client: Client, example: Prefix, features: TextFeatures) -> bool:
    """Return whether the partial message is continued, not ignored or followed by a new one.

    A template adds the end of the message and a new header where it is not: then the prompt has
    more tokens. A server that does not count tokens, or refuses the comparison, is believed.
    """
    path, body = _message(client, "prefill", example)
    common = {features.limit: 1}

    def prompt_tokens(body: Mapping[str, Any]) -> int | None:
        request = Request(path, {**body, **common}, _prompt_tokens, (_length(example), 1))
        try:
            return client.probe(request)
        except Refused:
            return None

    continued = prompt_tokens(body)
    finished = prompt_tokens({key: body[key] for key in ("messages", "tools") if key in body})
    if continued is None or finished is None or continued < finished:
        return True
    client.log(
        f"{client.label}: accepts continue_final_message, but the prompt has as many tokens "
        "without it; if its server always continues a last message of the assistant, set "
        "continuation=prefill"
    )
    return False


def _described(features: TextFeatures) -> str:
    number = "any number of" if features.samples is None else f"{features.samples}"
    seeds = "" if features.seeds else ", no seeds"
    return f"{features.form}, {number} sample(s) in a request{seeds}"


def _message(client: Client, form: Form, prefix: Prefix) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request in a form, without sampling."""
    if form == "ids":
        assert prefix.token_ids is not None
        return "/completions", {"prompt": [int(token) for token in prefix.token_ids]}
    if form in ("text", "bare_text"):
        # The template has put the special tokens into the text.
        flags = {"add_special_tokens": False} if form == "text" else {}
        return "/completions", {"prompt": prefix.text, **flags}
    messages = [_message_of_api(message) for message in prefix.messages]
    tools = {"tools": [dict(tool) for tool in prefix.tools]} if prefix.tools else {}
    if prefix.partial:
        messages.append({"role": "assistant", "content": prefix.partial})
        if form == "instruction":
            messages.append({"role": "user", "content": client.settings.instruction})
        if form == "prefill":
            flags = {"continue_final_message": True, "add_generation_prompt": False}
            return "/chat/completions", {"messages": messages, **tools, **flags}
    return "/chat/completions", {"messages": messages, **tools}


def _message_of_api(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as an API takes it: arguments of its calls are JSON texts."""

    def call_of_api(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function")
        if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
            return call
        arguments = json.dumps(function.get("arguments") or {})
        return {**call, "function": {**function, "arguments": arguments}}

    calls = message.get("tool_calls")
    return dict(message) | ({"tool_calls": [call_of_api(call) for call in calls]} if calls else {})


def _request(
    client: Client,
    features: TextFeatures,
    prefix: Prefix,
    size: int,
    max_tokens: int,
    sampling: Mapping[str, Any],
    sample: str,
) -> Request:
    """Return the request for `size` continuations; `sample` tells apart further ones."""
    path, body = _message(client, features.form, prefix)
    body |= {features.limit: max_tokens, **sampling}
    if size > 1:
        body["n"] = size
    if features.seeds:
        # Of the prefix, too: the same noise must not be drawn after each of them.
        whole = json.dumps([sample, path, body], sort_keys=True)
        body["seed"] = int.from_bytes(hashlib.sha256(whole.encode()).digest()[:4]) >> 1
    read = _texts_of_chat if path.startswith("/chat") else _texts_of_completions
    given = _length(prefix) + len(client.settings.instruction.encode())
    return Request(path, body, read, (given, size * max_tokens), sample)


def _length(prefix: Prefix) -> int:
    """Return the tokens of a prefix, at most: a token is at least one byte."""
    if prefix.token_ids is not None:
        return len(prefix.token_ids)
    texts = [*(message["content"] for message in prefix.messages), prefix.partial]
    return sum(len(text.encode()) for text in texts) + TURN_TOKENS * len(texts)


def _continued(client: Client, features: TextFeatures, prefix: Prefix, text: str) -> str:
    """Return a text without an echo of its prefix; count echoes and empty texts."""
    if features.form in ("instruction", "trailing"):
        whole = text
        text = without_echo(prefix.partial, whole)
        client.count("echoed_texts", int(text != whole))
    client.count("texts")
    client.count("empty_texts", int(not text))
    return text


def without_echo(partial: str, text: str) -> str:
    """Return the text without the prefix, or a long end of it, that the server repeated first."""
    for start in (partial, partial.strip()):
        if start and text.startswith(start):
            return text[len(start) :]
    # Cut off by the limit while it still repeated the prefix.
    if len(text) >= ECHO and partial.strip().startswith(text.strip()):
        return ""
    for size in range(min(len(partial), len(text)), ECHO - 1, -1):
        if text.startswith(partial[-size:]):
            return text[size:]
    return text


def _texts_of_completions(answer: Any) -> list[str]:
    return _texts(answer, lambda choice: choice["text"])


def _texts_of_chat(answer: Any) -> list[str]:
    # Null content is an answer without text, such as one that ended within its reasoning.
    return _texts(answer, lambda choice: choice["message"].get("content") or "")


def _texts(answer: Any, text_of: Callable[[Any], Any]) -> list[str]:
    """Return the texts of the choices in the order of their index; raise `Malformed`."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)
        texts = [text_of(choice) for choice in choices]
    except (KeyError, TypeError, AttributeError):
        raise Malformed("expected choices with a text") from None
    if not all(isinstance(text, str) for text in texts):
        raise Malformed("expected choices with a text")
    return [_whole(text) for text in texts]


def _whole(text: str) -> str:
    """Return a text with U+FFFD for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _prompt_tokens(answer: Any) -> int | None:
    try:
        return int(answer["usage"]["prompt_tokens"])
    except (KeyError, TypeError, ValueError):
        return None
