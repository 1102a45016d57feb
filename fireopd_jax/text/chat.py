"""Conversations to token ids and back, with the tokenizer's own chat template.

    conversation -> prompt_ids -> [sampler] -> decode -> text
    reference text -> response_ids

A prompt ends with the header of the assistant's turn. A response contains none of the template's
special tokens, except the end-of-sequence token.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError

STOP_SLOTS = 8
"""Maximum number of stop ids: the size of the sampler's static array of them."""
FIXED_ARGUMENTS = ("conversation", "add_generation_prompt", "tokenize", "return_dict", "padding")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    template_kwargs: Mapping[str, Any],
    *,
    begun: Sequence[str] | None = None,
    add_generation_prompt: bool = True,
) -> list[list[int]]:
    """Return the token ids of each conversation, up to the first token of the response.

    `begun` are beginnings of the responses, verbatim, which the ids then include. They follow the
    header of the assistant's turn as that of a new response: a template may render a finished
    message otherwise, without its reasoning or surrounding spaces. Without
    `add_generation_prompt` the ids have no such header. Raises `UserError` if the template is
    missing or rejects a prompt.
    """
    check_template(tokenizer, template_kwargs)
    if not conversations:
        return []
    turns = [
        [{"role": turn["role"], "content": turn["content"]} for turn in conversation]
        for conversation in conversations
    ]
    try:
        rendered = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=add_generation_prompt,
            tokenize=begun is None,
            return_dict=False,
            padding=False,
            **template_kwargs,
        )
    except TemplateError as error:
        raise UserError(f"the chat template rejects a prompt: {error}") from error
    if begun is not None:
        texts = [text + start for text, start in zip(rendered, begun, strict=True)]  # pyright: ignore[reportOperatorIssue]
        rendered = tokenizer(texts, add_special_tokens=False, padding=False)["input_ids"]
    return [list(row) for row in rendered]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]


def check_template(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]) -> None:
    """Raise on a missing template, or on an argument that the template would silently ignore."""
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "expected a chat_template.jinja beside its tokenizer.json"
        )
    template = tokenizer.get_chat_template()
    for name in template_kwargs:
        if name in FIXED_ARGUMENTS:
            raise UserError(f"chat_template_kwargs: {name!r} is set by fireopd and cannot be given")
        if not re.search(rf"\b{re.escape(name)}\b", template):
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


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's, then those of a generation config.

    References end with the first one. Raises `UserError` without one, or with over `STOP_SLOTS`.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
    others = (generation or {}).get("eos_token_id")
    others = [others] if isinstance(others, int) else others or []
    ids = tuple(dict.fromkeys([end, *others]))
    if len(ids) > STOP_SLOTS or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(
            f"generation_config.json: eos_token_id is {others!r}; expected at most "
            f"{STOP_SLOTS} token ids in all"
        )
    return ids
