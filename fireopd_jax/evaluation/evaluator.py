"""Sample responses to problems and grade them: avg@k, pass@k and maj@k with 95 % intervals.

prompts -> generate -> decode -> Response -> grade -> Graded -> EvalResult -> figures
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from fireopd_jax.evaluation.responses import (
    Graded,
    Grader,
    Problem,
    Response,
    grade,
    rectangle,
    write_responses,
)
from fireopd_jax.evaluation.statistics import interval_95, majority, pass_at_k, sizes
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.types import Prompts, Rollout

Figures = dict[str, float | int]


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Grades of one model's K responses to each of N problems."""

    samples: int
    correct: Bool[np.ndarray, "N K"]
    majority: Float64[np.ndarray, " N"]
    """Score of each problem's most frequent final answer."""
    question: Int64[np.ndarray, " N"]
    """Problems with the same prompt have the same number."""
    tokens: Int64[np.ndarray, "N K"]
    """Response lengths."""
    finished: Bool[np.ndarray, "N K"]
    plain: Bool[np.ndarray, "N K"] | None = None
    """Verdicts of math-verify alone, where it graded every response."""

    @classmethod
    def of(cls, graded: Sequence[Graded], samples: int) -> "EvalResult":
        """Return the result of responses, `samples` of each problem; there may be no problem."""
        rows = rectangle(graded)
        shape = (len(rows), samples)

        def values(name: str, dtype: type) -> np.ndarray:
            found = [[getattr(each, name) for each in row] for row in rows]
            return np.asarray(found, dtype).reshape(shape)

        number = {name: i for i, name in enumerate(dict.fromkeys(row[0].question for row in rows))}
        return cls(
            samples=samples,
            correct=values("correct", bool),
            majority=np.asarray(
                [majority([e.final for e in row], [e.correct for e in row]) for row in rows],
                np.float64,
            ),
            question=np.asarray([number[row[0].question] for row in rows], np.int64),
            tokens=values("tokens", np.int64),
            finished=values("finished", bool),
            plain=values("plain", bool) if _asked(graded) else None,
        )

    @property
    def mean(self) -> float:
        """avg@k: the mean over problems of the fraction of correct responses; NaN without any."""
        return float(np.mean(self.correct)) if self.correct.size else float("nan")

    def summary(self) -> Figures:
        """Return the figures that are logged and saved; intervals are clustered by question."""
        k = self.samples
        figures: Figures = {f"avg@{k}": self.mean}
        figures["interval_95"] = interval_95(self.correct.mean(axis=1), self.question)
        scores = {f"pass@{i}": pass_at_k(self.correct, i) for i in sizes(k)}
        for name, values in (scores | {f"maj@{k}": self.majority}).items():
            figures[name] = _mean(values)
            figures[f"{name}_interval_95"] = interval_95(values, self.question)
        if self.plain is not None:
            figures[f"plain_avg@{k}"] = _mean(self.plain)
        return figures | {
            "problems": len(self.correct),
            "questions": len(np.unique(self.question)),
            "mean_length": _mean(self.tokens),
            "finished": _mean(self.finished),
            "truncated": 1 - _mean(self.finished),
        }


def _asked(graded: Sequence[Graded]) -> bool:
    """Return whether math-verify was asked for every response, and there is one."""
    return bool(graded) and all(each.plain is not None for each in graded)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else float("nan")


def evaluate(
    responses: Iterable[Response],
    problems: Sequence[Problem],
    *,
    grader: Grader,
    name: str,
    out: Path | None = None,
) -> list[Graded]:
    """Return the graded responses to the problems of the set `name`; `out` is written with them."""
    graded = grade(responses, {problem.index: problem for problem in problems}, grader, name)
    if out is not None:
        write_responses(out, graded)
    return graded


def sample(
    generate: Callable[[Prompts], Rollout],
    batches: Sequence[Prompts],
    decode: Callable[[np.ndarray], str],
    advance: Callable[[int], None] = lambda batches: None,
) -> Iterator[Response]:
    """Yield the responses to the prompts, by row; padding rows (`row` < 0) have none.

    `advance` is called after each batch.
    """
    drawn: dict[int, int] = {}
    for prompts in batches:
        rollout: Rollout = fetched(generate(prompts))
        for i in np.flatnonzero(prompts.row >= 0):
            row = int(prompts.row[i])
            yield Response(
                row=row,
                sample=drawn.get(row, 0),
                text=decode(np.asarray(rollout.tokens[i][rollout.mask[i]])),
                tokens=int(rollout.mask[i].sum()),
                finished=bool(rollout.finished[i]),
            )
            drawn[row] = drawn.get(row, 0) + 1
        advance(1)
