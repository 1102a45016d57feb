"""Rows of text, parsed from the columns of a source; errors name the file, the row and the column.

    columns of a row -> RowReader -> Row

A row has text only; `pipeline.py` tokenizes it. What is left out of a row is counted.
"""

import dataclasses
import fnmatch
import json
import math
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.files import kind
from fireopd_jax.data.messages import check_unicode, conversation, holds_messages, last_turn, tools
from fireopd_jax.data.schemas import ABSENT, Columns, Record, lookup, paths, required
from fireopd_jax.text.chat import Message


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One prompt, with its answer, reference response and teacher, where given."""

    prompt: tuple[Message, ...]
    answer: str | None
    reference: str | None
    teacher: str | None
    origin: str
    """File and line, for error messages."""
    privileged: str | None = None
    """Solution that only the teacher sees."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools that the chat template describes."""
    begun: str = ""
    """Beginning of the response, given by the data: the prompt's ids end with it."""
    source: int = 0
    """Index of the source in the mixture."""


class RowReader:
    """Parses the rows of one source, and counts what becomes of conversations' last turns."""

    def __init__(
        self,
        columns: Columns,
        source: int = 0,
        teacher: str | None = None,
        routes: Mapping[str, str] = types.MappingProxyType({}),
        *,
        tests: bool = False,
    ):
        """Read these columns; all rows have `teacher` if it is given, else see `routes`.

        With `tests` answers are tests of programs: objects and lists become JSON.
        """
        self.columns = columns
        self.source = source
        self.teacher = teacher
        self.routes = routes
        self.tests = tests
        self.counts: Counter[str] = Counter()
        """Number of rows by what was done with the last turn, in words."""

    def __call__(self, record: Record, origin: str) -> Row:
        """Return the row of one record."""
        columns = self.columns
        value = required(record, columns.prompt, "prompt_column", origin)
        where = f"{origin}: column {columns.prompt!r}"
        messages = conversation(value, where)
        if messages and messages[0]["role"] != "system":
            messages = [*self._system(record, origin), *messages]
        self._add_input(record, messages, origin)
        reference = self._reference(record, messages, origin)
        begun, turn = self._last_turn(messages, where)
        if turn is not None:
            reference = self._preferred(turn, reference)
        if not any(each["content"].strip() for each in messages):
            raise UserError(f"{where}: the prompt is empty")
        answer = self._answer(record, origin)
        privileged = self._text(record, columns.privileged, "privileged", origin)
        return Row(
            prompt=tuple(messages),
            answer=answer if answer and answer.strip() else None,
            reference=reference,
            privileged=reference if privileged is None else privileged,
            # No default column name: rows are routed only if the configuration asks for it.
            teacher=self.teacher or self._teacher(record, origin),
            origin=origin,
            tools=self._tools(record, origin),
            begun=begun,
            source=self.source,
        )

    def _answer(self, record: Record, origin: str) -> str | None:
        column = self.columns.answer
        value = self._value(record, column, "answer", origin) if self.tests else None
        if isinstance(value, Mapping | list):
            return json.dumps(value)
        return self._text(record, column, "answer", origin)

    def _system(self, record: Record, origin: str) -> list[Message]:
        text = self._text(record, self.columns.system, "system", origin)
        return [Message(role="system", content=text)] if text else []

    def _add_input(self, record: Record, messages: list[Message], origin: str) -> None:
        if text := self._text(record, self.columns.input, "input", origin):
            asked = f"{messages[-1]['content']}\n{text}"
            messages[-1] = Message(role=messages[-1]["role"], content=asked)

    def _reference(self, record: Record, messages: list[Message], origin: str) -> str | None:
        """Return the reference's text; of several messages, those before it join the prompt."""
        column = self.columns.reference
        value = self._value(record, column, "reference", origin)
        if column is None or value is None:
            return None
        where = f"{origin}: column {column!r}"
        if not holds_messages(value):
            if isinstance(value, list) and len(value) > 1:
                self.counts["the first of several references is used"] += 1
                value = value[:1]
            return plain_text(value, where)
        turns = conversation(value, where)
        final = last_turn(turns)
        if final is None:
            raise UserError(f"{where}: expected messages that end with an assistant's turn")
        messages.extend(turns[:-1])
        return self._spoken(final)

    def _last_turn(self, messages: list[Message], where: str) -> tuple[str, str | None]:
        """Remove a final assistant turn; return it as (prefill, reference)."""
        final = last_turn(messages)
        if final is None:
            return "", None
        messages.pop()
        if self.columns.last_turn == "reference":
            return "", self._spoken(final)
        if "tool_calls" in final:
            raise UserError(
                f"{where}: the last turn calls a tool, which no response continues; expected "
                "the tool's answer after it, or data.last_turn=reference"
            )
        self.counts["the last turn begins the response (data.last_turn=prefill)"] += 1
        return final["content"], None

    def _preferred(self, turn: str, reference: str | None) -> str:
        """Return the reference of a row that has a last turn and, if given, a column with one."""
        if reference is not None and self.columns.own_reference:
            self.counts["the last turn is not used, the reference has a column of its own"] += 1
            return reference
        self.counts["the last turn is the reference"] += 1
        return turn

    def _spoken(self, turn: Message) -> str | None:
        """Return the text of a reference turn; None for one that calls tools, which is counted."""
        if "tool_calls" in turn:
            self.counts["the last turn calls tools, which is no reference"] += 1
            return None
        if "reasoning_content" in turn:
            self.counts["the reasoning of the last turn is not used"] += 1
        return turn["content"]

    def _teacher(self, record: Record, origin: str) -> str | None:
        """Return the teacher that a row names, or that `routes` has for the value it names."""
        value = self._text(record, self.columns.teacher, "teacher", origin)
        if value is None or not self.routes:
            return value
        for pattern, teacher in self.routes.items():
            if fnmatch.fnmatchcase(value, pattern):
                return teacher
        raise UserError(
            f"{origin}: column {self.columns.teacher!r}: data.routes has no teacher for {value!r}; "
            f"it has {', '.join(self.routes)}{nearest(value, self.routes)}; '*' is for all others"
        )

    def _tools(self, record: Record, origin: str) -> tuple[Mapping[str, Any], ...] | None:
        column = self.columns.tools
        value = self._value(record, column, "tools", origin)
        return tools(value, f"{origin}: column {column!r}")

    def _text(self, record: Record, column: str | None, purpose: str, origin: str) -> str | None:
        value = self._value(record, column, purpose, origin)
        if isinstance(value, Mapping):
            inner = [each for each in paths(record) if each.startswith(f"{column}.")]
            raise UserError(
                f"{origin}: column {column!r}: expected a text or a number, found an object"
                + (f" with {', '.join(inner)}; name one of them" if inner else "")
            )
        return plain_text(value, f"{origin}: column {column!r}")

    def _value(self, record: Record, column: str | None, purpose: str, origin: str) -> Any:
        """Return a column's value; None where the row lacks a column that is not required."""
        if column is None:
            return None
        if column in self.columns.required:
            return required(record, column, f"{purpose}_column", origin)
        value = lookup(record, column)
        return None if value is ABSENT else value


def plain_text(value: Any, where: str) -> str | None:
    """Return a text or a number as text; whole floats lose `.0`, NaN and null become None.

    Tables with missing values store integers as floats: 18.0 stands for `18`. Of a list of texts
    or numbers, as sets of problems with several answers have it, the parts are joined by commas.
    """
    if isinstance(value, list):
        parts = [plain_text(each, where) for each in value]
        return ", ".join(part for part in parts if part is not None) or None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{where}: the number is too large for a float; write it as a text")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: expected a text or a number, found {kind(value)}")
    text = str(value)
    check_unicode(text, where)
    return text
