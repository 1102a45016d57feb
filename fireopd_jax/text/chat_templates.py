"""Chat templates by choice: the tokenizer's own, one of its named ones, a file's, or a built-in.

    tokenizer, `chat_template` of a model -> the tokenizer with that template

The chosen template is the tokenizer's from then on: it is saved with it, and `transformers` reads
it. Templates that are built in begin with what the tokenizer puts before a text, such as its BOS.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fireopd_jax.config import UserError, dotted, nearest
from fireopd_jax.runtime.limits import parse_json, read_text

OPENING, GAP = "OPENING", "GAP"
"""Stand in a built-in template for what the tokenizer puts before a text, and for a space where it
reads the start of a text as if there was one."""
PLAIN = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    "{{- raise_exception('plain writes a single message of the user as it is, without roles; this "
    "prompt has ' ~ messages | map(attribute='role') | join(', ') ~ '; expected a template for "
    "conversations, such as chatml') -}}"
    "{%- endif -%}"
    "{{- OPENING ~ ('' if messages[0]['content'].startswith(' ') else GAP) -}}"
    "{{- messages[0]['content'] -}}"
)
CHATML = (
    "{{- OPENING -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TULU = (
    "{{- OPENING -}}"
    "{%- for message in messages -%}"
    "{{- '<|' ~ message['role'] ~ '|>\n' ~ message['content'] -}}"
    "{{- eos_token ~ '\n' if message['role'] == 'assistant' else '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)
QUESTION = (
    "{{- OPENING -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'Question: ' ~ message['content'] ~ '\nAnswer:' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- ' ' ~ message['content'] ~ '\n\n' -}}"
    "{%- elif message['role'] == 'system' -%}{{- message['content'] ~ '\n\n' -}}"
    "{%- else -%}"
    "{{- raise_exception('question has no form for the role ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
BUILT_IN = {"plain": PLAIN, "chatml": CHATML, "tulu": TULU, "question": QUESTION}
"""For models without a template of their own: the bare prompt; ChatML; turns marked by plain text;
questions and answers."""
NAMES = ", ".join(BUILT_IN)
PROBES = ("a", "1+1=", " b", "\nC")
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a model's folder has its template, in the order of `transformers`."""


def key_of(model: str) -> str:
    """Return the key, or the option, that chooses the chat template of a model."""
    role, _, name = model.partition(" ")
    if role == "teacher":
        return dotted(("teachers", name, "chat_template"))
    return f"{role}.chat_template" if role in ("student", "base") else "--chat-template"


def named(model: str) -> str:
    """Return the name of a model in errors; that of a command is "the model"."""
    return "the model" if model in ("", "model") else model


def with_template(
    tokenizer: PreTrainedTokenizerBase, chosen: str | None, model: str
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chosen template; None leaves its own.

    `chosen` is the name of one of its templates, a built-in's, a file, a model's folder, or the
    text of a template. Raises UserError, which names the key of `model`, for anything else.
    """
    if chosen is None:
        return tokenizer
    own = copy.copy(tokenizer)
    own.chat_template = _text(tokenizer, chosen, key_of(model))
    return own


def chat_template(
    tokenizer: PreTrainedTokenizerBase, model: str, tools: Sequence[Any] | None = None
) -> str:
    """Return the template for a prompt with these tools.

    Raises UserError for a tokenizer without one, or with several of which none is the default.
    """
    key, found = key_of(model), tokenizer.chat_template
    if not found:
        raise UserError(
            f"{named(model)}: its tokenizer {tokenizer.name_or_path!r} has no chat "
            f"template; set {key} to a file, or to one of {NAMES}"
        )
    several = found if isinstance(found, Mapping) else {"default": found}
    if odd := [each for each in several.values() if not isinstance(each, str)]:
        raise UserError(
            f"{named(model)}: the chat template of its tokenizer {tokenizer.name_or_path!r} is "
            f"{odd[0]!r}, expected a text; set {key} to another"
        )
    if "default" not in several and not (tools and "tool_use" in several):
        raise UserError(
            f"{named(model)}: its tokenizer has several chat templates and no default; "
            f"set {key} to one of {', '.join(several)}"
        )
    return tokenizer.get_chat_template(tools=list(tools) if tools else None)


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts before a text: its BOS, if it adds one."""
    whole, bare = _ids(tokenizer, PROBES[0], special=True), _ids(tokenizer, PROBES[0])
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _text(tokenizer: PreTrainedTokenizerBase, chosen: str, key: str) -> str:
    if "{{" in chosen or "{%" in chosen:
        return chosen
    found = tokenizer.chat_template
    several = found if isinstance(found, Mapping) else {}
    if chosen in several:
        return several[chosen]
    if chosen in BUILT_IN:
        return _built_in(tokenizer, chosen, key)
    path = Path(chosen).expanduser()
    if not path.exists():
        names = [*several, *BUILT_IN]
        raise UserError(
            f"{key}: {chosen!r} is no file, and no template has that name{nearest(chosen, names)}; "
            f"expected a file, or one of {', '.join(names)}"
        )
    return _of_path(path, key)


def _built_in(tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> str:
    """Return a built-in template for this tokenizer."""
    ids = opening(tokenizer)
    start = "".join(map(str, tokenizer.convert_ids_to_tokens(ids)))

    def faithful(gap: str) -> bool:
        return all(
            _ids(tokenizer, start + ("" if probe[0] == " " else gap) + probe)
            == [*ids, *_ids(tokenizer, probe)]
            for probe in PROBES
        )

    text, gap = BUILT_IN[name], next((gap for gap in ("", " ") if faithful(gap)), None)
    if gap is None and GAP in text:
        raise UserError(
            f"{key}: after {start!r} this tokenizer reads a text otherwise than alone, so that "
            f"{name} cannot be written; expected a file, or another of {NAMES}"
        )
    return text.replace(OPENING, _quoted(start)).replace(GAP, _quoted(gap or ""))


def _quoted(text: str) -> str:
    """Return a text as a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def _of_path(path: Path, key: str) -> str:
    """Return the template in a file or a model's folder."""
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise UserError(f"{key}: {path}: the folder has no {' and no '.join(FILES)}")
        return _of_path(file, key)
    try:
        text = read_text(path)
        found = parse_json(text).get("chat_template") if path.suffix == ".json" else text
    except (OSError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {path}: cannot be read as a chat template: {reason}") from None
    if isinstance(found, list):  # as tokenizer_config.json has named ones
        several = [each for each in found if isinstance(each, Mapping)]
        found = {str(each.get("name")): each.get("template") for each in several}
    if isinstance(found, Mapping):
        if "default" not in found:
            raise UserError(
                f"{key}: {path}: several templates and no default ({', '.join(found)}); expected "
                "a file with one"
            )
        found = found["default"]
    if not isinstance(found, str) or not ("{{" in found or "{%" in found):
        raise UserError(f"{key}: {path}: no chat template in it; expected one in Jinja")
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # pyright: ignore[reportArgumentType]
