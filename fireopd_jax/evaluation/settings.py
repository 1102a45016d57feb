"""Evaluation of models: the section `eval` of a configuration."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from fireopd_jax.config import LOCAL, Section, UnitInterval, config
from fireopd_jax.data.settings import DataConfig

HELD_OUT = "held_out"
"""Name of the problems that a run holds out from its own data."""


def set_name(name: str) -> str:
    """Return the name of an evaluation set; raise ValueError if files cannot be named by it."""
    if name == HELD_OUT or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"{name!r} is no name of a set: expected letters, digits, '_', '-' and '.', other than "
            f"{HELD_OUT!r}"
        )
    return name


Temperature = Annotated[float, Field(ge=0, le=1e6)]


@config
class EvalSetConfig(Section):
    """An evaluation set: problems with answers that are not in the run's own data."""

    path: Annotated[str | tuple[str, ...], LOCAL]
    """Its file or data set, or a list of them, as in `data.path`."""
    subset: str | None = None
    """As `data.subset`."""
    split: str | None = None
    """As `data.split`."""
    revision: str | None = None
    """As `data.revision`."""
    prompt_column: str | None = None
    """Column of the prompt. null: recognised as `data.prompt_column` is."""
    answer_column: str | None = None
    """Column of the answer. null: recognised as `data.answer_column` is."""
    grader: str | None = None
    """How responses are graded. null: `data.grader`."""
    problems: PositiveInt | None = None
    """Number of problems that are evaluated, chosen by a hash of their prompts, so that the choice
    does not depend on the order of the file. null: all."""
    samples: PositiveInt = 1
    """Responses per problem: the k of avg@k."""
    max_tokens: PositiveInt | None = None
    """Maximum response length. null: `rollout.max_tokens`."""
    temperature: Temperature | None = None
    """Sampling temperature; 0 is greedy. null: `eval.temperature`."""
    top_p: UnitInterval | None = None
    """Nucleus sampling mass. null: `eval.top_p`."""
    every: NonNegativeInt | None = None
    """Steps between evaluations during training, besides those at its start and its end; 0: only
    these. null: `eval.every`."""

    @property
    def data(self) -> DataConfig:
        """Where its rows are, and in which columns."""
        names = ("path", "subset", "split", "revision", "prompt_column", "answer_column")
        return DataConfig(**{name: getattr(self, name) for name in names})

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield `top_p` where sampling is greedy."""
        if self.temperature == 0:
            yield "top_p", "with temperature=0, which is greedy"


@config
class EvalConfig(Section):
    """Settings of the evaluation."""

    problems: NonNegativeInt | None = None
    """Number of problems held out from training; 0 turns the evaluation on them off. null: 64, or a
    tenth of the prompts with an answer if that is less: none where no row has an answer."""
    samples: PositiveInt = 4
    """Responses per problem: the k of avg@k."""
    batch_size: PositiveInt | None = None
    """Responses sampled at a time. null: as many as in a training step, with the same program."""
    temperature: Temperature = 1.0
    """Sampling temperature of the responses; 0 is greedy."""
    top_p: UnitInterval = 1.0
    """Nucleus sampling mass of the responses."""
    every: NonNegativeInt = 0
    """Steps between evaluations of the student during training; 0 turns them off."""
    every_problems: PositiveInt = 64
    """Number of held-out problems in the evaluations during training, with one response each."""
    sets: dict[Annotated[str, AfterValidator(set_name)], EvalSetConfig] = dataclasses.field(
        default_factory=dict
    )
    """Evaluation sets by name: other problems, on which the student is evaluated at the start, at
    the end and every `every` steps."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Nothing is evaluated without problems or sets, nor between steps without `every`."""
        if self.problems == 0:
            used = ("batch_size", "temperature", "top_p", "every") if self.sets else ("batch_size",)
            for field in dataclasses.fields(self):
                if field.name not in ("problems", "sets", *used):
                    yield field.name, "with eval.problems=0"
        elif not self.every:
            yield "every_problems", "with eval.every=0"
        if self.temperature == 0 and (self.problems != 0 or self.sets):
            yield "top_p", "with eval.temperature=0, which is greedy"
