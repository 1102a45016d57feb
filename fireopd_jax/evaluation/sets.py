"""Evaluation sets: problems with answers, from any file that the data readers read.

file -> rows -> the chosen ones -> EvalSet (problems; which of them share a prompt)
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fireopd_jax.config import UserError
from fireopd_jax.data.repeats import prompt_digest
from fireopd_jax.data.rows import Row
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_data
from fireopd_jax.evaluation.graders import unreadable
from fireopd_jax.evaluation.responses import Problem
from fireopd_jax.evaluation.settings import set_name


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Problems that models are evaluated on."""

    name: str
    problems: tuple[Problem, ...]
    understood: tuple[str, ...] = ()
    """How its files were read, a line each."""

    @property
    def rows(self) -> list[Row]:
        """The rows of the problems."""
        return [problem.row for problem in self.problems]

    def notes(self, kind: str) -> Iterator[str]:
        """Yield what a user should know: columns, sizes, duplicates, answers in question.

        `kind` is that of the grader.
        """
        yield from (f"{self.name}: {line}" for line in self.understood)
        first: dict[str, Problem] = {}
        again: list[tuple[Problem, Problem]] = []
        for each in self.problems:
            if (known := first.setdefault(each.question, each)) is not each:
                again.append((known, each))
        text = f"{self.name}: {len(self.problems)} problems"
        if again:
            known, each = again[0]
            text += (
                f", {len(first)} questions ({each.row.origin} has the prompt of {known.row.origin})"
            )
        yield text
        other = [(known, each) for known, each in again if known.row.answer != each.row.answer]
        if other:
            known, each = other[0]
            yield (
                f"{self.name}: warning: {len(other)} problems have the prompt of another and a "
                f"different answer: {each.row.origin} has {each.row.answer!r}, "
                f"{known.row.origin} has {known.row.answer!r}"
            )

        dead = [(each.row, unreadable(each.row.answer or "", kind)) for each in self.problems]
        if found := [f"{row.origin} ({reason})" for row, reason in dead if reason]:
            yield (
                f"{self.name}: warning: {len(found)} answers that no response can match, such as "
                f"{found[0]}"
            )

    def overlap(self, trained: Iterable[Row]) -> Iterator[str]:
        """Yield a warning with the number of problems whose prompts are trained on, if any."""
        origins = {prompt_digest(row): row.origin for row in trained}
        found = [row for row in self.rows if prompt_digest(row) in origins]
        if found:
            yield (
                f"{self.name}: warning: {len(found)} of {len(self.rows)} problems are trained on, "
                f"too: {found[0].origin} has the prompt of {origins[prompt_digest(found[0])]}"
            )


def read_set(name: str, data: DataConfig, limit: int | None = None) -> EvalSet:
    """Return the set of the rows of `data`, or of `limit` of them, in the order of the file.

    The rows with the smallest hashes of their prompts are chosen, whatever their order. Raises
    UserError, with file and line, for a row without an answer.
    """
    # Solutions are not needed, and of many forms.
    found = read_data(dataclasses.replace(data, reference_column="", privileged_column=""))
    rows, understood = found.rows, tuple(line for part in found.parts for line in part.notes())
    if limit is not None and limit < len(rows):
        ranked = sorted(range(len(rows)), key=lambda index: prompt_digest(rows[index]))
        rows = [rows[index] for index in sorted(ranked[:limit])]
    for row in rows:
        if row.answer is None or not row.answer.strip():
            raise UserError(
                f"{row.origin}: no answer to grade by in the evaluation set {name}; expected one "
                "in every row, in the column data.answer_column (answer_column of a set)"
            )
    problems = tuple(Problem(index, row) for index, row in enumerate(rows))
    return EvalSet(name, problems, understood)


def named_paths(arguments: Iterable[str]) -> dict[str, str]:
    """Return the paths of `NAME=PATH` or `PATH` by name, by default that of the file.

    Raises UserError for a name that no file can have, and for one that is given twice.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        given, _, path = argument.partition("=")
        if not path or "/" in given or Path(argument).exists():
            path = argument
            given = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(path).name.partition(".")[0])
            given = given.lstrip("_.-") or "set"
        try:
            name = set_name(given)
        except ValueError as error:
            raise UserError(f"--set {argument}: {error}") from None
        if name in found:
            raise UserError(
                f"--set {argument}: a set {name!r} is given twice; name them: --set NAME={path}"
            )
        found[name] = path
    return found
