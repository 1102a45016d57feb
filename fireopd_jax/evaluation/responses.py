"""Graded responses: one JSON line each, of all that a figure or a comparison needs.

Problem, Response -> grade -> Graded -> responses.jsonl -> Graded
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.data.repeats import prompt_digest
from fireopd_jax.data.rows import Row
from fireopd_jax.evaluation import graders
from fireopd_jax.evaluation.verdict import Verdict
from fireopd_jax.runtime.limits import parse_json
from fireopd_jax.runtime.processes import leads

QUESTION = 16
"""Hexadecimal digits that identify a question."""


@dataclasses.dataclass(frozen=True)
class Grader:
    """How responses are graded, and how their final answers are compared with one another."""

    verdict: Callable[[str, Row], Verdict]
    """(response, row of the problem) -> verdict."""
    final_answer: Callable[[str, Row], str]
    """The same -> final answer in normal form, empty without one."""

    @classmethod
    def of(cls, kind: str) -> "Grader":
        """Return the grader of a kind, see `data.grader`; raise UserError for an unknown one."""
        graders.check_kind(kind)
        return cls(
            lambda text, row: graders.verdict(
                row.begun + text, row.answer or "", graders.kind_of(row, kind)
            ),
            lambda text, row: graders.final_answer(row.begun + text, graders.kind_of(row, kind)),
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A row with an answer, as its graded responses name it."""

    index: int
    """Of the row in its set."""
    row: Row

    @property
    def question(self) -> str:
        """Identifier of the prompt: problems with equal prompts are one question."""
        return prompt_digest(self.row).hex()[:QUESTION]

    @property
    def prompt(self) -> str | list[Any]:
        """The text of a prompt of one turn, else its messages."""
        turns = self.row.prompt
        return turns[0]["content"] if len(turns) == 1 else [dict(turn) for turn in turns]


@dataclasses.dataclass(frozen=True)
class Response:
    """One response of a model to a problem."""

    row: int
    sample: int
    """Number among the problem's responses, from 0."""
    text: str
    tokens: int
    """Length, the stop token included."""
    finished: bool
    """Whether it ended before the length limit."""


@dataclasses.dataclass(frozen=True)
class Graded:
    """A graded response: a line of a file of responses."""

    row: int
    response: str
    answer: str
    correct: bool
    sample: int
    final: str
    """Final answer in the grader's normal form."""
    rule: str
    """Rule of the grader that decided."""
    plain: bool | None
    """Verdict of math-verify alone, where it was asked."""
    tokens: int
    finished: bool
    set: str
    question: str
    origin: str
    prompt: str | list[Any]


def grade(
    responses: Iterable[Response], problems: Mapping[int, Problem], grader: Grader, name: str
) -> list[Graded]:
    """Return the graded responses to the problems (by index) of the set `name`, in their order."""
    graded = []
    for response in responses:
        problem = problems[response.row]
        verdict = grader.verdict(response.text, problem.row)
        graded.append(
            Graded(
                row=problem.index,
                response=response.text,
                answer=problem.row.answer or "",
                correct=verdict.correct,
                sample=response.sample,
                final=grader.final_answer(response.text, problem.row),
                rule=verdict.rule,
                plain=verdict.plain,
                tokens=response.tokens,
                finished=response.finished,
                set=name,
                question=problem.question,
                origin=problem.row.origin,
                prompt=problem.prompt,
            )
        )
    return graded


def write_responses(file: Path, graded: Iterable[Graded]) -> None:
    """Write graded responses as JSON lines; the folder is made. Of several processes one writes."""
    if not leads():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(each)) + "\n" for each in graded)
    file.write_text("".join(lines), encoding="utf-8")


def read_responses(file: Path) -> dict[str, list[Graded]]:
    """Return the graded responses of a file by set, by row and sample.

    Raises UserError, with file and line, for a line that `write_responses` has not written, and for
    a response that is there twice.
    """
    sets: dict[str, dict[tuple[int, int], Graded]] = {}
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), start=1):
        each = _parsed(line, f"{file}:{number}")
        responses = sets.setdefault(each.set, {})
        if (each.row, each.sample) in responses:
            raise UserError(
                f"{file}:{number}: row {each.row}, sample {each.sample} of {each.set} is there "
                "twice; expected the responses of one model"
            )
        responses[each.row, each.sample] = each
    if not sets:
        raise UserError(f"{file}: the file holds no responses")
    return {name: [found[key] for key in sorted(found)] for name, found in sets.items()}


def _parsed(line: str, where: str) -> Graded:
    expected = "expected a line of graded responses, as `fireopd eval --out` writes them"
    try:
        record = parse_json(line)
    except ValueError:
        raise UserError(f"{where}: not valid JSON; {expected}") from None
    names = [field.name for field in dataclasses.fields(Graded)]
    missing = [name for name in names if not isinstance(record, dict) or name not in record]
    if missing:
        raise UserError(f"{where}: no {missing[0]!r}; {expected}")
    typed = {"row": int, "sample": int, "tokens": int, "correct": bool, "finished": bool}
    for name, kind in typed.items():
        if type(record[name]) is not kind:
            raise UserError(f"{where}: {name!r} is {record[name]!r}; {expected}")
    return Graded(**{name: record[name] for name in names})


def rectangle(graded: Sequence[Graded]) -> list[list[Graded]]:
    """Return the responses by problem, each with equally many.

    Raises UserError, with the origin, for a problem with another number of responses.
    """
    rows: dict[int, list[Graded]] = {}
    for each in graded:
        rows.setdefault(each.row, []).append(each)
    for own in rows.values():
        first = next(iter(rows.values()))
        if len(own) != len(first):
            raise UserError(
                f"{own[0].set}: {len(own)} responses to {own[0].origin}, {len(first)} to "
                f"{first[0].origin}; expected equally many"
            )
    return list(rows.values())
