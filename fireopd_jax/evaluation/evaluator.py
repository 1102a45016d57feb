"""Sample responses to held-out problems and grade them: avg@k with its 95 % interval.

prompts -> generate -> decode -> grade -> avg@k over problems
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from fireopd_jax.config import Section, UnitInterval, config
from fireopd_jax.text.graders import grade
from fireopd_jax.types import Prompts, Rollout


@config
class EvalConfig(Section):
    """Settings of the evaluation."""

    problems: NonNegativeInt = 256
    """Number of problems held out from training; 0 turns the evaluation off."""
    samples: PositiveInt = 8
    """Responses per problem: the k of avg@k."""
    batch_size: PositiveInt | None = None
    """Responses sampled at a time. null: as many as in a training step, with the same program."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Sampling temperature of the responses; 0 is greedy."""
    top_p: UnitInterval = 1.0
    """Nucleus sampling mass of the responses."""
    every: NonNegativeInt = 0
    """Steps between evaluations of the student during training; 0 turns them off."""
    every_problems: PositiveInt = 64
    """Number of problems in the evaluations during training, with one response each."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Nothing is evaluated without problems, nor between steps without `every`."""
        if not self.problems:
            for field in dataclasses.fields(self):
                if field.name not in ("problems", "batch_size"):
                    yield field.name, "with eval.problems=0"
            return
        if not self.every:
            yield "every_problems", "with eval.every=0"
        if self.temperature == 0:
            yield "top_p", "with eval.temperature=0, which is greedy"


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Grades of one model's responses."""

    samples: int
    scores: tuple[float, ...]
    """Fraction of correct responses, one value per problem."""
    mean_length: float
    """Mean response length in tokens."""
    finished: float
    """Fraction of responses that ended before the length limit."""

    @property
    def mean(self) -> float:
        """avg@k: the mean over problems of the fraction of correct responses; NaN without any."""
        return float(np.mean(self.scores)) if self.scores else float("nan")

    @property
    def interval(self) -> float:
        """Half-width of avg@k's 95 % interval: 1.96 standard errors, clustered by problem."""
        if len(self.scores) < 2:
            return float("nan")
        return float(1.96 * np.std(self.scores, ddof=1) / len(self.scores) ** 0.5)

    def summary(self) -> dict[str, float | int]:
        """Return the figures that are logged and saved."""
        return {
            f"avg@{self.samples}": self.mean,
            "interval_95": self.interval,
            "problems": len(self.scores),
            "mean_length": self.mean_length,
            "finished": self.finished,
        }


def evaluate(
    generate: Callable[[Prompts], Rollout],
    batches: Sequence[Prompts],
    decode: Callable[[np.ndarray], str],
    answers: Callable[[int], str],
    samples: int,
    *,
    advance: Callable[[int], None] = lambda rows: None,
    out: Path | None = None,
) -> EvalResult:
    """Sample and grade `samples` responses per problem.

    Padding rows (`row` < 0) are ignored; `advance` is called after each batch; `out` is written as
    JSON lines, one per response.
    """
    grades_by_row: dict[int, list[bool]] = {}
    lengths: list[int] = []
    finished: list[bool] = []
    lines: list[str] = []
    for prompts in batches:
        rollout: Rollout = jax.device_get(generate(prompts))
        for i in np.flatnonzero(prompts.row >= 0):
            row = int(prompts.row[i])
            text = decode(np.asarray(rollout.tokens[i][rollout.mask[i]]))
            correct = grade(text, answers(row))
            grades_by_row.setdefault(row, []).append(correct)
            lengths.append(int(rollout.mask[i].sum()))
            finished.append(bool(rollout.finished[i]))
            if out is not None:
                record = {"row": row, "response": text, "answer": answers(row), "correct": correct}
                lines.append(json.dumps(record))
        advance(1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return EvalResult(
        samples=samples,
        scores=tuple(float(np.mean(grades)) for grades in grades_by_row.values()),
        mean_length=float(np.mean(lengths)) if lengths else float("nan"),
        finished=float(np.mean(finished)) if finished else float("nan"),
    )
