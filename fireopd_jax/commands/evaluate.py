"""`fireopd eval`: figures of a model on evaluation sets, and its comparison with another.

    a run, a folder or a hub's name ┐
    --set FILE, its prompts -> ids ─┴─> Engine -> responses -> grades ┐
    a file of graded responses ───────────────────────────────────────┴─> figures, comparison

A run without a set is evaluated on its held-out problems, as its training does it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Sharding

from fireopd_jax.commands.generate import GenerateOptions, answers, make_requests, with_clock
from fireopd_jax.commands.journal import say
from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import render
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.evaluation.comparison import Side, compare
from fireopd_jax.evaluation.evaluator import EvalResult, evaluate
from fireopd_jax.evaluation.responses import (
    Graded,
    Grader,
    Response,
    read_responses,
    rectangle,
    write_responses,
)
from fireopd_jax.evaluation.sets import EvalSet, named_paths, read_set
from fireopd_jax.evaluation.settings import HELD_OUT
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.schema import load_sections
from fireopd_jax.rollout.requests import Completion
from fireopd_jax.runtime.files import plain, write_atomically
from fireopd_jax.session.eval_sets import check_positions
from fireopd_jax.session.exporting import at_step
from fireopd_jax.session.finished import held_out_responses, own_template_kwargs, run_config
from fireopd_jax.session.opening import open_any
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from fireopd_jax.text.chat import decode

MAX_TOKENS = 1024
OF_SETS = ("eval.samples=", "eval.temperature=", "eval.top_p=", "data.")
"""Overrides that a set takes."""
ELSEWHERE = ("data.path=", "data.mixture=")
"""Overrides that --set stands for."""
Responses = dict[str, list[Graded]]
"""Graded responses by set."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What is evaluated: a model, a run with one of its models, or a file of graded responses."""

    model: str
    name: str = "student"
    step: int | None = None
    """Checkpoint of a run; None: the finished model."""

    @property
    def file(self) -> Path | None:
        """The file of graded responses, if it is one."""
        return Path(self.model) if Path(self.model).is_file() else None


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What models are evaluated on, and how they are sampled."""

    sets: tuple[str, ...] = ()
    """`FILE` or `NAME=FILE`; none: the held-out problems of a run."""
    settings: tuple[str, ...] = ()
    """Overrides: of the run's `eval.*`, or with sets of `OF_SETS`."""
    samples: int | None = None
    problems: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    chat_template: str | None = None
    """Another chat template than the model's own."""
    ignore_config_keys: tuple[str, ...] = ()
    """Keys of the folder's config.json to ignore."""
    dtype: Literal["float32", "bfloat16"] | None = None
    slots: int | None = None
    tensor: int = 1

    def overrides(self) -> list[str]:
        """Return `settings` and the options that are keys of `eval`, which count more.

        One response of a problem is enough where sampling is greedy.
        """
        samples = 1 if self.samples is None and self.temperature == 0 else self.samples
        given = {"samples": samples, "temperature": self.temperature, "top_p": self.top_p}
        of_eval = [f"eval.{key}={value}" for key, value in given.items() if value is not None]
        return [*self.settings, *of_eval]


def evaluate_to(
    one: Evaluated,
    options: EvalOptions = EvalOptions(),
    *,
    against: Evaluated | None = None,
    out: Path | None = None,
    figures: Path | None = None,
) -> dict[str, Any]:
    """Return the figures of a model by set, and its comparison with `against`, if given.

    `out` is a new file for the graded responses of `one`, `figures` one for what is returned.
    Raises UserError for an existing file, and for options without effect.
    """
    for file in filter(None, (out, figures)):
        if file.exists():
            raise UserError(f"{file} exists; expected a new file")
    check_options(one, options)
    options = graded_as_run(one, options)
    if one.file is not None and against is not None and against.file is None:
        raise UserError(f"--against {against.model}: {one.model} is a file; expected another one")
    sets = opened_sets(options) if options.sets else []
    responses = graded(one, options, sets)
    found: dict[str, Any] = {"model": one.model, "sets": summaries(responses)}
    if against is not None:
        others = graded(against, options, sets)
        theirs = summaries(others)
        versus = compare(Side(one.model, responses), Side(against.model, others))
        found["against"] = against.model
        for name, own in found["sets"].items():
            own |= {"against": theirs[name], "comparison": versus[name]}
    if out is not None:
        write_responses(out, [each for own in responses.values() for each in own])
    if figures is not None:
        figures.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(figures, json.dumps(plain(found), indent=2) + "\n")
    return found


def check_options(one: Evaluated, options: EvalOptions) -> None:
    """Raise UserError for options that would have no effect."""
    if one.file is not None and (options.sets or options.settings):
        raise UserError(
            f"{one.model} holds graded responses, nothing is sampled; expected no --set and no keys"
        )
    if options.sets:
        for override in options.settings:
            if not override.startswith(OF_SETS) or override.startswith(ELSEWHERE):
                raise UserError(
                    f"{override}: with --set only eval.samples, eval.temperature, eval.top_p and "
                    "columns (data.*) may be given"
                )
        return
    names = ("samples", "problems", "max_tokens", "temperature", "top_p", "chat_template", "dtype")
    given = {name: getattr(options, name) for name in names} | {"step": one.step}
    given |= {"slots": options.slots, "seed": options.seed or None}
    given |= {"tensor": None if options.tensor == 1 else options.tensor}
    given |= {"ignore_config_keys": ",".join(options.ignore_config_keys) or None}
    for name, value in given.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag}: expected with --set FILE; without, a run's own eval.* count")


def graded_as_run(one: Evaluated, options: EvalOptions) -> EvalOptions:
    """Return the options with the grader of the run, if it is one and no other is given."""
    given = any(each.startswith("data.grader=") for each in options.settings)
    if given or not options.sets or not (Path(one.model) / "config.yaml").is_file():
        return options
    own = f"data.grader={run_config(Path(one.model)).data.grader}"
    return dataclasses.replace(options, settings=(own, *options.settings))


def opened_sets(options: EvalOptions) -> list[EvalSet]:
    """Return the sets; print sizes and duplicates on stderr."""
    columns = load_sections(options.overrides()).data
    sets = []
    for name, path in named_paths(options.sets).items():
        data: DataConfig = dataclasses.replace(columns, path=path)
        sets.append(read_set(name, data, options.problems))
        for note in sets[-1].notes(columns.grader):
            say(f"eval set {note}")
    return sets


def graded(one: Evaluated, options: EvalOptions, sets: Sequence[EvalSet]) -> Responses:
    """Return the graded responses: read from a file, or sampled."""
    if one.file is not None:
        return read_responses(one.file)
    if sets:
        return sampled(one, options, sets)
    if any((Path(one.model) / name).is_file() for name in ("model.json", "config.json")):
        raise UserError(f"{one.model}: a model has no problems of its own; give them: --set FILE")
    return {HELD_OUT: held_out_responses(Path(one.model), one.name, options.settings)[0]}


def summaries(responses: Responses) -> dict[str, dict[str, Any]]:
    """Return the figures by set."""
    found = {}
    for name, own in responses.items():
        rows = rectangle(own)
        found[name] = EvalResult.of(own, len(rows[0])).summary()
    return found


def sampled(one: Evaluated, options: EvalOptions, sets: Sequence[EvalSet]) -> Responses:
    """Return a model's graded responses to the problems of the sets, by row and sample."""
    config = load_sections(options.overrides())
    own, grader = config.eval, Grader.of(config.data.grader)
    if own.temperature == 0 and own.samples > 1:
        raise UserError(
            f"{own.samples} samples at temperature 0 are one and the same response; expected "
            "--samples 1, or a temperature"
        )
    knobs = GenerateOptions(
        max_tokens=options.max_tokens or MAX_TOKENS,
        samples=own.samples,
        temperature=own.temperature,
        top_p=own.top_p,
        seed=options.seed,
    )
    mesh = make_mesh(MeshConfig(tensor=options.tensor))
    say(f"loading {one.model}")
    spec, params, kwargs = opened(one, options, replicated(mesh))
    kwargs = with_clock(spec, kwargs, None)
    found: Responses = {}
    for each in sets:
        ids = render(spec.tokenizer, each.rows, kwargs, "model")
        check_positions(ids, each.rows, knobs.max_tokens, spec.model.config, "--max-tokens")
        requests = list(make_requests(spec, [own.tolist() for own in ids], knobs))
        purpose = "eval"  # and so the responses are those of a training run of this seed
        drawn = answers(spec, params, requests, knobs, options.slots, mesh, purpose)
        responses = [response(spec, completion, knobs.samples) for completion in drawn]
        responses.sort(key=lambda response: (response.row, response.sample))
        found[each.name] = evaluate(responses, each.problems, grader=grader, name=each.name)
    return found


def opened(
    one: Evaluated, options: EvalOptions, place: Sharding
) -> tuple[ModelSpec, Params, Mapping[str, Any]]:
    """Return spec, parameters and template arguments of the model, or of a run's checkpoint."""
    if one.step is None:
        return open_any(
            one.model,
            one.name,
            options.dtype,
            place,
            options.ignore_config_keys,
            options.chat_template,
        )
    keys = ",".join(options.ignore_config_keys) or None
    for flag, value in (
        ("dtype", options.dtype),
        ("chat-template", options.chat_template),
        ("ignore-config-keys", keys),
    ):
        if value is not None:
            raise UserError(f"--{flag} {value} has no effect on a checkpoint (--step)")
    run = Path(one.model)
    spec, params = at_step(run, one.name, one.step)
    return spec, jax.device_put(params, place), own_template_kwargs(run, one.name)


def response(spec: ModelSpec, completion: Completion, samples: int) -> Response:
    """Return a completion as a response; its id is that of `pipeline.eval_prompts`."""
    ids = completion.tokens.tolist()
    return Response(
        row=completion.id // samples,
        sample=completion.id % samples,
        text=decode(spec.tokenizer, ids),
        tokens=len(ids),
        finished=completion.finish == "stop",
    )


def show(found: Mapping[str, Any], flat: bool) -> None:
    """Print the figures as JSON; `flat`: of the only set alone."""
    (own,) = found["sets"].values() if flat else (found,)
    print(json.dumps(plain(own), indent=2))
