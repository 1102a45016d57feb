"""Prompts of a command: from a file or standard input, as token ids of the model.

    --prompts -> rows, their columns -> ids in the chat template, or as plain text

Rows are read as those of training data; errors name the options of this command.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.data.messages import check_unicode
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import Row, read_rows, tables
from fireopd_jax.runtime.limits import read_text
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat import Message, prompt_ids
from fireopd_jax.text.chat_templates import opening

STANDARD = "-"
"""Standard input, or output."""
LARGEST_PROMPTS = 2**30
"""Bytes of prompts that are read whole."""
FLAGS = {"data.prompt_column": "--prompt-column", "data.path": "--prompts"}
"""Options in the place of configuration keys."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt with all columns of its row."""

    row: Row
    columns: Mapping[str, Any]

    @property
    def prompt(self) -> str | list[Message]:
        """The prompt's text, or the messages of a conversation."""
        turns = self.row.prompt
        return turns[0]["content"] if len(turns) == 1 else list(turns)


def read_prompts(source: str, column: str | None = None) -> list[Asked]:
    """Return the prompts of a file, of `data.path`'s other kinds, or of standard input (`-`).

    A .txt file has a prompt on each line, standard input too unless its first line is JSON. Raises
    UserError, which names file and line.
    """
    with in_words_of_options():
        if source == STANDARD:
            return _standard_input(column)
        if Path(source).suffix == ".txt":
            return _text_lines(Path(source), source, column)
        return _rows(source, column)


def rendered_ids(
    spec: ModelSpec, rows: Sequence[Row], template_kwargs: Mapping[str, Any]
) -> list[list[int]]:
    """Return the token ids of the prompts in the model's chat template."""
    begun = [row.begun for row in rows]
    return prompt_ids(
        spec.tokenizer,
        [row.prompt for row in rows],
        template_kwargs,
        begun=begun if any(begun) else None,
        tools=[row.tools for row in rows],
        origins=[row.origin for row in rows],
        model=spec.name,
    )


def plain_ids(spec: ModelSpec, rows: Sequence[Row], bos: bool = False) -> list[list[int]]:
    """Return the token ids of plain-text prompts without a template.

    With `bos` they begin with what the tokenizer puts before a text, its BOS. Raises UserError for
    a chat, and for an empty prompt.
    """
    for row in rows:
        if len(row.prompt) != 1:
            raise UserError(f"{row.origin}: --raw expects a plain-text prompt, not a chat")
    texts = [row.prompt[0]["content"] + row.begun for row in rows]
    start = opening(spec.tokenizer) if bos else []
    if bos and not start:
        print("fireopd: --bos adds nothing: this tokenizer adds no BOS", file=sys.stderr)
    ids = spec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    for row, tokens in zip(rows, ids, strict=True):  # pyright: ignore[reportArgumentType]
        if not tokens:
            raise UserError(f"{row.origin}: the prompt is empty; --raw adds no token to it")
    return [[*start, *tokens] for tokens in ids]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]


@contextmanager
def in_words_of_options() -> Iterator[None]:
    """Name the options of the command in errors of a block, not the keys of a run."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, flag in FLAGS.items():
            text = text.replace(key, flag)
        raise UserError(text) from error


def _rows(source: str, column: str | None, shown: str | None = None) -> list[Asked]:
    """Return the prompts of a source of rows; `shown` is its name in errors."""
    # Of columns that are only copied, nothing is expected.
    unread = dict.fromkeys(("answer_column", "reference_column", "privileged_column"), "")
    config = DataConfig(path=source, prompt_column=column, **unread)
    named = shown or source
    try:
        rows = read_rows(config)
    except UserError as error:
        raise UserError(str(error).replace(source, named)) from error
    columns = {
        f"{name}:{number}": record for name, table in tables(config) for number, record in table
    }
    return [
        Asked(
            dataclasses.replace(row, origin=row.origin.replace(source, named)), columns[row.origin]
        )
        for row in rows
    ]


def _text_lines(file: Path, shown: str, column: str | None) -> list[Asked]:
    """Return the prompts of a text, one on each line that is not blank."""
    if column is not None:
        raise UserError(f"--prompt-column {column}: {shown} is plain text, without columns")
    try:
        lines = read_text(file, LARGEST_PROMPTS).removeprefix("\ufeff").split("\n")
    except (OSError, ValueError) as error:
        utf8 = "not valid UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
        reason = error.strerror if isinstance(error, OSError) else f"{utf8}{error}"
        raise UserError(f"--prompts: {shown} cannot be read ({reason})") from error
    asked = []
    for number, line in enumerate(lines, start=1):
        if text := line.removesuffix("\r").strip():
            check_unicode(text, f"{shown}:{number}")
            turns = (Message(role="user", content=text),)
            asked.append(Asked(Row(turns, None, None, None, f"{shown}:{number}"), {}))
    if not asked:
        raise UserError(f"{shown}: no prompt in it; expected one on each line")
    return asked


def _standard_input(column: str | None) -> list[Asked]:
    """Return the prompts of standard input: JSON if it begins with an object, else lines."""
    if sys.stdin.isatty():
        raise UserError("--prompts: expected a file, or prompts on standard input (a pipe)")
    content, shown = sys.stdin.buffer.read(LARGEST_PROMPTS + 1), "standard input"
    if len(content) > LARGEST_PROMPTS:
        raise UserError(
            f"--prompts: over {LARGEST_PROMPTS:,} bytes on standard input; expected a file"
        )
    with tempfile.TemporaryDirectory(prefix="fireopd-") as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_bytes(content)
        if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
            return _rows(str(file), column, shown)
        return _text_lines(file, shown, column)
