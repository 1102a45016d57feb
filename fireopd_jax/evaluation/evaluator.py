"""Draw responses to held-out problems and grade them: avg@k with its interval.

prompts -> generate -> decode -> grade -> avg@k over problems
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from fireopd_jax.config import UnitInterval, config
from fireopd_jax.evaluation.graders import grade
from fireopd_jax.types import Prompts, Rollout


@config
class EvalConfig:
    """How a model is evaluated."""

    problems: NonNegativeInt = 256
    """Problems held out of the training rows; 0 evaluates nothing."""
    samples: PositiveInt = 8
    """Responses a problem: the k of avg@k."""
    batch_size: PositiveInt | None = None
    """Responses drawn at a time; by default as many as a step draws, by the same program."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Of the responses; 0 is greedy."""
    top_p: UnitInterval = 1.0
    """Nucleus of the responses."""
    every: NonNegativeInt = 0
    """Steps between evaluations of the student in training; 0 is none."""
    every_problems: PositiveInt = 64
    """How many of the problems those use, with one response each."""


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Grades of one model."""

    samples: int
    scores: tuple[float, ...]
    """Share of right responses, a problem."""
    mean_length: float
    finished: float
    """Share of responses that ended before the limit."""

    @property
    def mean(self) -> float:
        """avg@k: the mean over problems of the share of right responses."""
        return float(np.mean(self.scores)) if self.scores else float("nan")

    @property
    def interval(self) -> float:
        """Half the width of avg@k's 95 % interval: 1.96 standard errors, clustered by problem."""
        if len(self.scores) < 2:
            return float("nan")
        return float(1.96 * np.std(self.scores, ddof=1) / len(self.scores) ** 0.5)

    def summary(self) -> dict[str, float | int]:
        """Give the figures that are kept."""
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
    """Grade `samples` responses to each problem; `out` gets one line a response."""
    right: dict[int, list[bool]] = {}
    lengths: list[int] = []
    finished: list[bool] = []
    lines: list[str] = []
    for prompts in batches:
        rollout: Rollout = jax.device_get(generate(prompts))
        for i in np.flatnonzero(prompts.row >= 0):
            row = int(prompts.row[i])
            text = decode(np.asarray(rollout.tokens[i][rollout.mask[i]]))
            correct = grade(text, answers(row))
            right.setdefault(row, []).append(correct)
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
        scores=tuple(float(np.mean(grades)) for grades in right.values()),
        mean_length=float(np.mean(lengths)) if lengths else float("nan"),
        finished=float(np.mean(finished)) if finished else float("nan"),
    )
