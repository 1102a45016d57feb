"""`fireopd data`: what a run would make of its rows, before any run.

    files, configuration, key=value -> Data -> Findings (schema, counts, lengths, routes, problems)
                              models -> one rendered prompt each, lengths in tokens

Without a model that is named, prompts are shown as conversations and measured in characters.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import MANY, render, split, unseen
from fireopd_jax.data.rows import Row
from fireopd_jax.data.sources import Data, read_data, route
from fireopd_jax.evaluation.graders import unreadable
from fireopd_jax.recipe.layers import find_config
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.recipe.schema import Config, load_sections
from fireopd_jax.session.specs import ModelSpec, make_spec
from fireopd_jax.terminal.progress import progress

SHOWN_TEXT = 1200
SHOWN_PROBLEMS = 8
QUANTILES = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One rendered prompt of a model, and the lengths of all of its prompts in tokens."""

    model: str
    origin: str
    text: str
    tokens: dict[str, int]
    too_long: int
    """Prompts over `data.max_prompt_tokens`."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What `fireopd data` found."""

    sources: list[str]
    """How each source was understood."""
    rows: int
    train: int
    held_out: int
    unanswered: int
    repeated: int
    """Rows that repeat an earlier prompt."""
    characters: dict[str, int]
    references: int
    tools: int
    routes: dict[str, int]
    """Teacher -> rows."""
    prompts: list[Prompt]
    example: list[dict[str, Any]]
    """First conversation, where no model is named."""
    problems: list[str]

    def lines(self) -> Iterator[str]:
        """Yield the findings as text."""
        yield from self.sources
        yield (
            f"{self.rows} rows: {self.train} to train on, {self.held_out} held out (eval.problems);"
            f" {self.unanswered} without an answer, {self.references} with a reference response, "
            f"{self.tools} with tools, {self.repeated} repeat an earlier prompt"
        )
        yield f"characters of a prompt: {spread(self.characters)}"
        for teacher, count in self.routes.items():
            yield f"route to {teacher}: {count} rows"
        for prompt in self.prompts:
            yield (
                f"{prompt.model}: tokens of a prompt: {spread(prompt.tokens)}; {prompt.too_long} "
                "longer than data.max_prompt_tokens"
            )
            yield f"{prompt.model}: the prompt of {prompt.origin}:\n{prompt.text}"
        for turn in self.example:
            yield f"{turn['role']}: {clipped(turn['content'])}"
        yield f"problems: {len(self.problems) or 'none'}"
        for problem in self.problems[:SHOWN_PROBLEMS]:
            yield f"  {problem}"
        if (more := len(self.problems) - SHOWN_PROBLEMS) > 0:
            yield f"  and {more} more; --json lists all"


def show(arguments: Sequence[str], as_json: bool) -> None:
    """Print what a run would make of the rows; `arguments` are files, configurations, overrides."""
    files, settings = divided(arguments)
    config = load_sections([*settings, *([f"data.path={json.dumps(files)}"] if files else [])])
    if files and config.data.mixture:
        raise UserError(f"{files[0]}: the configuration reads data.mixture; expected one of them")
    findings = examine(config)
    if as_json:
        print(json.dumps(dataclasses.asdict(findings), indent=2, ensure_ascii=False))
    else:
        print(*findings.lines(), sep="\n")


def divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files of rows and the settings: configuration files and `key=value`."""
    files, settings = [], []
    for argument in arguments:
        given = "=" in argument and not Path(argument).exists()
        (settings if given or _is_config(argument) else files).append(argument)
    if not arguments:
        raise UserError("expected a file of rows, a configuration, or data.path=...")
    return files, settings


def _is_config(argument: str) -> bool:
    if Path(argument).suffix in (".yaml", ".yml"):
        return True
    if Path(argument).exists() or argument.startswith("builtin:"):
        return False
    try:
        find_config(argument)
    except UserError:
        return False
    return True


def examine(config: Config) -> Findings:
    """Return the findings on the rows of a configuration."""
    data = read_data(config.data)
    rows = data.rows
    models = named_models(config)
    routes = routed(config, rows)
    shown = [
        shown_prompt(make_spec(name, model), rows, np.flatnonzero(own), config)
        for name, model, own in models_with_rows(models, rows, routes, config)
    ]
    train, held_out, problems = divided_rows(config, rows)
    return Findings(
        sources=[line for part in data.parts for line in part.notes()],
        rows=len(rows),
        train=train,
        held_out=held_out,
        unanswered=sum(row.answer is None for row in rows),
        repeated=data.num_repeated,
        characters=quantiles([_characters(row) for row in rows]),
        references=sum(row.reference is not None for row in rows),
        tools=sum(row.tools is not None for row in rows),
        routes=dict(collections.Counter(routes)),
        prompts=shown,
        example=[] if shown else [dict(turn) for turn in rows[0].prompt],
        problems=[*problems, *conflicting(data), *unparsable(rows, config.data.grader)],
    )


def named_models(config: Config) -> dict[str, ModelConfig]:
    """Return the models that have a folder, or a name on the hub, by name."""
    models: dict[str, ModelConfig] = {"student": config.student}
    models |= {f"teacher {name}": teacher for name, teacher in config.teachers.items()}
    return {name: model for name, model in models.items() if model.path is not None}


def routed(config: Config, rows: Sequence[Row]) -> list[str]:
    """Return each row's teacher, of those the configuration or the rows name; none without."""
    names = list(config.teachers)
    if not names:
        return [row.teacher for row in rows if row.teacher is not None]
    found = route(rows, names, config.data.teacher_column)
    return [names[index] for index in found]


def models_with_rows(
    models: dict[str, ModelConfig], rows: Sequence[Row], routes: Sequence[str], config: Config
) -> Iterator[tuple[str, ModelConfig, np.ndarray]]:
    """Yield name, configuration and the mask of the rows of each model that has any."""
    for name, model in models.items():
        own = np.ones(len(rows), bool)
        if name != "student" and len(config.teachers) > 1:
            own = np.asarray([each == name.removeprefix("teacher ") for each in routes])
        if own.any():
            yield name, model, own


def shown_prompt(spec: ModelSpec, rows: Sequence[Row], own: np.ndarray, config: Config) -> Prompt:
    """Return the first prompt of a model as it reads it, and the lengths of all of them."""
    chosen = [rows[int(index)] for index in own]
    show = progress if len(chosen) > MANY else unseen
    with show(f"prompts of {spec.name}", len(chosen)) as advance:
        kwargs = spec.config.chat_template_kwargs
        ids = render(spec.tokenizer, chosen, kwargs, spec.name, advance)
    lengths = [len(each) for each in ids]
    text = spec.tokenizer.decode(ids[0])
    assert isinstance(text, str)
    limit = config.data.max_prompt_tokens
    return Prompt(
        model=spec.name,
        origin=chosen[0].origin,
        text=clipped(text),
        tokens=quantiles(lengths),
        too_long=sum(length > limit for length in lengths),
    )


def divided_rows(config: Config, rows: Sequence[Row]) -> tuple[int, int, list[str]]:
    """Return numbers of rows to train on and held out; a problem where they cannot be divided."""
    try:
        train, held_out = split(rows, config.eval.problems)
    except UserError as error:
        return len(rows), 0, [str(error)]
    return len(train), len(held_out), []


def conflicting(data: Data) -> Iterator[str]:
    """Yield prompts with two answers, by both origins."""
    for one, other in data.conflicts:
        yield (
            f"one prompt, two answers: {one.origin} ({one.answer!r}) and "
            f"{other.origin} ({other.answer!r})"
        )


def unparsable(rows: Sequence[Row], grader: str) -> Iterator[str]:
    """Yield gold answers that no response can match."""
    for row in rows:
        if row.answer is not None and (reason := unreadable(row.answer, grader)):
            shown = clipped(row.answer, 80)
            yield f"{row.origin}: the answer {shown!r} cannot be graded: {reason}"


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return least, median, 95th percentile and greatest of some lengths."""
    return {name: int(np.quantile(lengths, at)) for name, at in QUANTILES.items()}


def spread(lengths: dict[str, int]) -> str:
    """Return quantiles as text."""
    return ", ".join(f"{name} {length}" for name, length in lengths.items())


def clipped(text: str, size: int = SHOWN_TEXT) -> str:
    """Return a text without its middle, if it is long."""
    return text if len(text) <= size else f"{text[: size // 2]} ... {text[-size // 2 :]}"


def _characters(row: Row) -> int:
    return sum(len(turn["content"]) for turn in row.prompt)
