"""The session of a run: setup, folder and log, with sampling from and grading of its models."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import eval_prompts
from fireopd_jax.evaluation.evaluator import EvalResult, evaluate, sample
from fireopd_jax.evaluation.responses import Graded, Grader, Problem
from fireopd_jax.evaluation.settings import HELD_OUT
from fireopd_jax.models.language_model import Params
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.runs.folder import RunFolder
from fireopd_jax.runs.log import Log
from fireopd_jax.runs.trackers.reporting import Trackers
from fireopd_jax.runtime.files import recorded, write_atomically
from fireopd_jax.runtime.processes import by_leader, fetched
from fireopd_jax.runtime.signals import Interrupted, StopFlag
from fireopd_jax.session.eval_sets import OpenSet
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.mesh import by_rows, replicate, shard_rows
from fireopd_jax.sharding.offload import on_devices
from fireopd_jax.terminal.progress import progress
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Array, Prompts, Rollout

Figures = dict[str, Any]
"""avg@k with its interval, lengths and counts of one model."""


@runtime_checkable
class Generate(Protocol):
    """Samples one response to each prompt."""

    def __call__(
        self, params: Params, prompts: Prompts, sampling: Sampling, version: Array
    ) -> Rollout:
        """Return the rollout; `version` is the update count of `params`."""
        ...


@dataclasses.dataclass
class Session:
    """A run in progress: setup, folder, log and compiled samplers."""

    setup: Setup
    folder: RunFolder
    stop: StopFlag
    log: Log
    generators: dict[str, Generate] = dataclasses.field(default_factory=dict)
    trackers: Trackers = dataclasses.field(default_factory=Trackers.none)
    """Where metrics go besides metrics.jsonl."""
    connections: Any = None
    """Connections to served teachers (`session.served.Connections`), once there are any."""

    def served_stats(self) -> dict[str, float]:
        """Return the counters of requests to served teachers, {} without any."""
        return {} if self.connections is None else self.connections.stats()

    def generate(
        self,
        spec: ModelSpec,
        params: Params,
        prompts: Prompts,
        sampling: Sampling,
        version: Array | None = None,
        max_tokens: int | None = None,
        *,
        policy: bool = False,
    ) -> Rollout:
        """Return a rollout sampled from any model of the run; equal models share the program.

        `max_tokens` is the width of the responses, by default `rollout.max_tokens`. `policy` keeps
        the statistics of the decoding steps: `Rollout.policy`.
        """
        # Replicated like the training state's counter: another sharding would compile again.
        mesh = self.setup.mesh
        counter = replicate(mesh, jnp.int32(0) if version is None else version)
        asked, params = shard_rows(mesh, prompts), on_devices(params)
        drawn = self.sampler(spec, max_tokens)(params, student_side(asked), sampling, counter)
        return dataclasses.replace(drawn, prompts=asked, policy=drawn.policy if policy else None)

    def sampler(self, spec: ModelSpec, max_tokens: int | None = None) -> Generate:
        """Return the jitted sampler of a model, the same one for equal models."""
        return sampler_of(self.setup, self.generators, spec, max_tokens)

    def evaluate(
        self,
        spec: ModelSpec,
        params: Params,
        label: str,
        *,
        indices: np.ndarray | None = None,
        samples: int | None = None,
        quiet: bool = False,
    ) -> EvalResult:
        """Return a model's grades on the held-out problems, or the rows `indices`.

        `quiet` is for use in a training loop: no progress is shown. Raises `Interrupted` between
        two batches after a signal.
        """
        setup, config = self.setup, self.setup.config.eval
        samples = samples or config.samples
        indices = setup.held_out if indices is None else indices

        def draw(prompts: Prompts, sampling: Sampling) -> Rollout:
            if self.stop:
                raise Interrupted(f"eval {label}: stopped")
            return self.generate(spec, params, prompts, sampling)

        out = self.folder.evaluation / f"{label}.jsonl"
        batches = -(-len(indices) * samples // setup.config.eval_batch_size)
        with _shown(f"eval {label}", batches, quiet) as bar:
            graded = grade(setup, spec, draw, indices, samples, bar, out)
        return EvalResult.of(graded, samples)

    def evaluate_set(
        self, opened: OpenSet, spec: ModelSpec, params: Params, label: str, *, quiet: bool = False
    ) -> EvalResult:
        """Return a model's grades on an evaluation set; `quiet` as in `evaluate`."""
        settings, name = opened.settings, opened.name
        sampling = self.setup.sampling(
            "eval",
            temperature=settings.temperature,
            top_p=settings.top_p,
            spec=spec,
            max_tokens=settings.max_tokens,
        )

        def draw(prompts: Prompts) -> Rollout:
            if self.stop:
                raise Interrupted(f"eval {label} on {name}: stopped")
            return self.generate(spec, params, prompts, sampling, max_tokens=settings.max_tokens)

        batches = opened.batches(self.setup.config.eval_batch_size)
        with _shown(f"eval {label} on {name}", len(batches), quiet) as bar:
            graded = evaluate(
                sample(draw, batches, decoder(spec), bar),
                opened.problems,
                grader=Grader.of(settings.grader),
                name=name,
                out=self.folder.evaluation / f"{label}.{name}.jsonl",
            )
        return EvalResult.of(graded, settings.samples)

    def graded_set(
        self,
        opened: OpenSet,
        spec: ModelSpec,
        params: Callable[[], Params],
        label: str,
        *,
        quiet: bool = False,
    ) -> Figures:
        """Return a model's figures on a set, evaluated once per run and then read from eval/."""

        def result() -> EvalResult:
            return self.evaluate_set(opened, spec, params(), label, quiet=quiet)

        return self._once(f"{label}.{opened.name}", result)

    def graded_sets(
        self, spec: ModelSpec, params: Callable[[], Params], label: str
    ) -> dict[str, Figures]:
        """Return a model's figures on every evaluation set by name."""
        return {
            opened.name: self.graded_set(opened, spec, params, label) for opened in self.setup.sets
        }

    def _once(self, label: str, result: Callable[[], EvalResult]) -> Figures:
        """Return the figures of an evaluation, from eval/ if it was made before."""
        file = self.folder.evaluation / f"{label}.json"
        if by_leader(file.is_file):
            try:
                figures = by_leader(lambda: recorded(file))
                self.log(f"{scores(label, figures)}, as evaluated before")
                return figures
            except UserError:  # of a full disk, or a machine that lost power: made again
                self.log(f"{file} is damaged, the evaluation is repeated")
        start = time.monotonic()
        figures = result().summary()
        write_atomically(file, json.dumps(figures, indent=2) + "\n")
        self.log(f"{scores(label, figures)}, {time.monotonic() - start:.1f} s")
        return figures

    def graded(
        self,
        spec: ModelSpec,
        params: Callable[[], Params],
        label: str,
        *,
        indices: np.ndarray | None = None,
    ) -> Figures:
        """Return the figures of a model, graded once per run and then read from eval/."""
        return self._once(label, lambda: self.evaluate(spec, params(), label, indices=indices))

    def graded_teachers(self, params: Sequence[Callable[[], Params]]) -> list[Figures]:
        """Return the figures of each teacher on the held-out problems routed to it."""
        return [
            self.graded(
                spec,
                params[index],
                spec.slug,
                indices=self.setup.own_rows(self.setup.held_out, index),
            )
            for index, spec in enumerate(self.setup.teachers)
        ]


def scores(label: str, figures: Figures) -> str:
    """Return avg@k of an evaluation in words, with its interval and number of problems."""
    key = next(name for name in figures if name.startswith("avg@"))
    model, _, name = label.partition(".")
    shown = model.replace("_", " ") + (f" on {name}" if name else "")
    return (
        f"{shown}: {key} {figures[key]:.3f} ± {figures['interval_95']:.3f} of "
        f"{figures['problems']} problems, mean length {figures['mean_length']:.1f}, "
        f"{figures['finished']:.0%} finished"
    )


def _shown(label: str, batches: int, quiet: bool) -> AbstractContextManager[Callable[[int], None]]:
    """Show the progress of an evaluation, unless it is quiet."""
    return nullcontext(lambda n: None) if quiet else progress(label, batches)


def generate_by_route(
    session: Session,
    specs: Sequence[ModelSpec],
    params: Sequence[Params],
    prompts: Prompts,
    sampling: Callable[[ModelSpec], Sampling],
    version: Array,
    max_tokens: int | None = None,
) -> Rollout:
    """Return a rollout, on the host, in which each row is sampled by the model of its route.

    `prompts.tokens` are in the template of that model; rows of length 0 have empty responses.
    """
    found: Rollout | None = None
    route = np.asarray(prompts.teacher)
    for index, (spec, own) in enumerate(zip(specs, params, strict=True)):
        mine = route == index
        length = np.where(mine, prompts.length, 0).astype(np.int32)
        part = dataclasses.replace(prompts, length=length)
        drawn = session.generate(spec, own, part, sampling(spec), version, max_tokens)
        drawn = dataclasses.replace(fetched(drawn), prompts=prompts)

        def chosen(new: np.ndarray, old: np.ndarray, mine: np.ndarray = mine) -> np.ndarray:
            return np.where(mine.reshape(-1, *[1] * (np.ndim(new) - 1)), new, old)

        found = drawn if found is None else jax.tree.map(chosen, drawn, found)
    if found is None:
        raise ValueError("no model to sample from")
    return found


def sampler_of(
    setup: Setup, made: dict[str, Generate], spec: ModelSpec, max_tokens: int | None = None
) -> Generate:
    """Return the jitted sampler of a model, taken from `made`, or made and added to it."""
    width = max_tokens or setup.config.rollout.max_tokens
    key = f"{spec.model!r} {width}"
    if key not in made:
        made[key] = make_generate(setup, spec, width)
    return made[key]


def make_generate(setup: Setup, spec: ModelSpec, max_tokens: int | None = None) -> Generate:
    """Return the jitted sampler of one model, for responses of `rollout.max_tokens` or as given."""
    config = setup.config.rollout

    def run(params: Params, prompts: Prompts, sampling: Sampling, version: jax.Array) -> Rollout:
        return generate(
            spec.model,
            params,
            prompts,
            sampling,
            version,
            max_tokens=max_tokens or config.max_tokens,
            slots=config.slots,
            memory=config.cache,
            mesh=setup.mesh,
        )

    return jax.jit(run, out_shardings=by_rows(setup.mesh))


def grade(
    setup: Setup,
    spec: ModelSpec,
    draw: Callable[[Prompts, Sampling], Rollout],
    indices: np.ndarray,
    samples: int,
    advance: Callable[[int], None],
    out: Path | None = None,
) -> list[Graded]:
    """Return the graded responses that `draw` returns for the rows `indices`.

    Prompts are in the model's own template. `out` is a file for the graded responses, if any.
    """
    config = setup.config.eval
    sampling = setup.sampling("eval", temperature=config.temperature, top_p=config.top_p, spec=spec)
    own = spec in setup.teachers

    def answer(prompts: Prompts) -> Rollout:
        return draw(as_teacher(prompts) if own else prompts, sampling)

    batches = eval_prompts(setup.encoded, indices, samples, setup.config.eval_batch_size)
    return evaluate(
        sample(answer, batches, decoder(spec), advance),
        [Problem(index, setup.rows[index]) for index in indices.tolist()],
        grader=Grader.of(setup.config.data.grader),
        name=HELD_OUT,
        out=out,
    )


def decoder(spec: ModelSpec) -> Callable[[np.ndarray], str]:
    """Return the function from a response's token ids to its text."""
    return lambda ids: decode(spec.tokenizer, ids.tolist())


def student_side(prompts: Prompts) -> Prompts:
    """Return the prompts without what sampling does not use: one program for all their widths."""
    return dataclasses.replace(
        prompts,
        teacher_tokens=prompts.tokens,
        teacher_length=prompts.length,
        reference=None,
        reference_length=None,
    )


def as_teacher(prompts: Prompts) -> Prompts:
    """Return the prompts with each row's teacher tokens in place of the student's."""
    return dataclasses.replace(
        prompts, tokens=prompts.teacher_tokens, length=prompts.teacher_length
    )
