"""What the columns of a source mean: recognised by their names, unless the configuration says so.

    first rows of a source -> recognise -> Columns (prompt, answer, reference, ...)

Of several columns for one purpose the first of these lists counts; the others are named in the
log. The prompt's column must be in every row, as must every column that the configuration names.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.settings import SourceConfig

Record = Mapping[str, Any]
PROMPTS = (
    "prompt",
    "messages",
    "conversations",
    "problem",
    "question",
    "query",
    "instruction",
)
ANSWERS = (
    "answer",
    "reward_model.ground_truth",
    "ground_truth",
    "final_answer",
    "expected_answer",
    "extra_info.answer",
    "solution",
)
OWN_REFERENCES = ("reference", "completion")
"""References that are ours or TRL's by name; the others give way to a conversation's last turn."""
REFERENCES = (*OWN_REFERENCES, "response", "output", "solution")
SYSTEM_WITH = ("conversations", "problem", "question", "query", "instruction")
"""Prompts beside which a column `system` is the system message."""
ABSENT = object()


LATE = {*ANSWERS, *REFERENCES, "privileged", "system", "tools"}
"""Names that mean something, which no row may be the first to have after the others were read."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a source by purpose, None where there is none."""

    prompt: str
    answer: str | None
    reference: str | None
    privileged: str | None
    tools: str | None
    teacher: str | None
    system: str | None
    input: str | None
    """Text below an instruction, in Alpaca's form."""
    required: frozenset[str]
    """Those that the configuration names: every row must have them."""
    last_turn: Literal["reference", "prefill"]
    unused: tuple[str, ...]

    @property
    def own_reference(self) -> bool:
        """Whether the reference's column counts more than the conversation's last turn."""
        return self.reference in self.required or (
            self.reference is not None and self.reference.lower() in OWN_REFERENCES
        )

    @property
    def form(self) -> str:
        """Name of the form of the rows, for the log."""
        names = {self.prompt, self.answer, self.reference}
        if self.answer is not None and self.answer.startswith("reward_model."):
            return "verl's"
        if "completion" in names:
            return "TRL's prompt and completion"
        forms = {
            "messages": "conversations",
            "conversations": "ShareGPT's",
            "query": "ms-swift's",
            "instruction": "Alpaca's",
            "problem": "problem and answer",
            "question": "question and answer",
        }
        return forms.get(self.prompt.lower(), "prompt")

    def described(self) -> str:
        """Return one line: the form, each purpose with its column, and the unused columns."""
        purposes = ("answer", "reference", "privileged", "tools", "system", "input", "teacher")
        named = [("prompt", self.prompt)]
        named += [(each, getattr(self, each)) for each in purposes]
        line = ", ".join(f"{purpose}={column}" for purpose, column in named if column)
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.form} columns: {line}{unused}"


def recognise(sample: Sequence[Record], source: SourceConfig, origin: str) -> Columns:
    """Return the columns of a source from its first rows.

    Raises UserError, with the columns that exist, if no column can be the prompt.
    """
    prompt = source.prompt_column or _first(sample, PROMPTS)
    if prompt is None:
        raise UserError(
            f"{origin}: no column is a prompt by its name ({', '.join(PROMPTS)}); name it as "
            f"data.prompt_column; the row has {listed(sample[0])}"
        )
    lower = prompt.lower()
    answer = _column(sample, source.answer_column, ANSWERS)
    others = tuple(name for name in REFERENCES if name != (answer or "").lower())
    asks_system = lower in SYSTEM_WITH
    found = {
        "prompt": prompt,
        "answer": answer,
        "reference": _column(sample, source.reference_column, others),
        "privileged": _column(sample, source.privileged_column, ("privileged",)),
        "tools": _column(sample, source.tools_column, ("tools",)),
        "teacher": source.teacher_column or None,
        "system": _first(sample, ("system",)) if asks_system else None,
        "input": _first(sample, ("input",)) if lower == "instruction" else None,
    }
    stated = (
        source.prompt_column,
        source.answer_column,
        source.reference_column,
        source.privileged_column,
        source.tools_column,
        source.teacher_column,
    )
    used = {name for name in found.values() if name}
    names = dict.fromkeys(name for record in sample for name in record)
    return Columns(
        **found,
        required=frozenset(name for name in stated if name),
        last_turn=source.last_turn or ("prefill" if lower == "prompt" else "reference"),
        unused=tuple(
            name
            for name in names
            if name not in used and not any(each.startswith(f"{name}.") for each in used)
        ),
    )


def lookup(record: Record, column: str) -> Any:
    """Return a column's value, or ABSENT; `a.b` is the column of that name, else b of a."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def required(record: Record, column: str, key: str, origin: str) -> Any:
    """Return a column's value; raise `UserError` with the existing columns if it is missing."""
    value = lookup(record, column)
    if value is ABSENT:
        known = list(paths(record))
        raise UserError(
            f"{origin}: no column {column!r} (data.{key}); the row has "
            f"{listed(record)}{nearest(column, known)}"
        )
    return value


def paths(record: Record) -> Sequence[str]:
    """Return the names of the columns and of the values in those that are objects."""
    inner = [
        f"{name}.{key}"
        for name, value in record.items()
        if isinstance(value, Mapping)
        for key in value
    ]
    return [*record, *inner]


def listed(record: Record) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(map(repr, record)) or "none"


def _column(sample: Sequence[Record], stated: str | None, candidates: Sequence[str]) -> str | None:
    """Return the stated column ("" is none), or the first candidate that some row has."""
    return _first(sample, candidates) if stated is None else stated or None


def _first(sample: Sequence[Record], candidates: Sequence[str]) -> str | None:
    """Return the first candidate that some row has, as it is spelled there."""
    names = dict.fromkeys(name for record in sample for name in record)
    spelled = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    for name in candidates:
        if name in spelled:
            return spelled[name]
        if "." in name and any(lookup(record, name) not in (ABSENT, None) for record in sample):
            return name
    return None


def check_late(names: Collection[str], columns: Columns, origin: str) -> None:
    """Raise UserError for a column that would be read if the first rows had it."""
    for name in sorted(names):
        if name.lower() in LATE and name not in columns.required:
            raise UserError(
                f"{origin}: column {name!r} is in none of the first rows, by which columns are "
                "recognised; put such a row first, or name the columns (data.*_column)"
            )
