"""An open run: its setup, its folder, its log, and how its models answer and are graded."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.data.pipeline import eval_prompts
from fireopd_jax.evaluation.evaluator import EvalResult, evaluate
from fireopd_jax.evaluation.graders import grade as grade_text
from fireopd_jax.models.language_model import Params
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.runs.folder import RunFolder
from fireopd_jax.runs.tracking import Log, progress
from fireopd_jax.runtime.signals import Interrupted, StopFlag
from fireopd_jax.session.setup import ModelSpec, Setup
from fireopd_jax.sharding.mesh import by_rows, replicate, shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Array, Prompts, Rollout


@dataclasses.dataclass
class Session:
    """What the stages of a run share."""

    setup: Setup
    folder: RunFolder
    stop: StopFlag
    log: Log
    generators: dict[str, Callable[..., Rollout]] = dataclasses.field(default_factory=dict)

    def generate(
        self,
        spec: ModelSpec,
        params: Params,
        prompts: Prompts,
        sampling: Sampling,
        version: Array | None = None,
    ) -> Rollout:
        """Draw responses from any model of the run; equal architectures share the program."""
        key = repr(spec.model)
        if key not in self.generators:
            self.generators[key] = make_generate(self.setup, spec)
        # Placed as the counter of an update is: a program is compiled for where its inputs are.
        version = replicate(self.setup.mesh, jnp.int32(0) if version is None else version)
        return self.generators[key](params, shard_rows(self.setup.mesh, prompts), sampling, version)

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
        """Grade a model on the held-out problems, or on those named; each model in its template.

        `quiet` is for use within a training loop: no progress, and a signal is left to the loop.
        """
        setup, config = self.setup, self.setup.config.eval
        samples = samples or config.samples
        indices = setup.held_out if indices is None else indices

        def draw(prompts: Prompts, sampling: Sampling) -> Rollout:
            if self.stop and not quiet:
                raise Interrupted(f"eval {label}: stopped")
            return self.generate(spec, params, prompts, sampling)

        out = self.folder.evaluation / f"{label}.jsonl"
        if quiet:
            return grade(setup, spec, draw, indices, samples, lambda rows: None, out)
        batches = -(-len(indices) * samples // setup.config.eval_batch_size)
        with progress(f"eval {label}", batches) as bar:
            return grade(setup, spec, draw, indices, samples, bar, out)

    def grades(self, rollout: Rollout) -> np.ndarray:
        """Grade responses against their rows' answers: f32[B], 1 where right; waits for them."""
        drawn, setup = jax.device_get(rollout), self.setup
        right = np.zeros(len(drawn.mask), np.float32)
        for i in np.flatnonzero(drawn.mask.any(axis=1)):
            text = decode(setup.student.tokenizer, drawn.tokens[i][drawn.mask[i]].tolist())
            answer = setup.rows[int(drawn.prompts.row[i])].answer
            assert answer is not None  # `set_up` has refused rows without one
            right[i] = grade_text(text, answer)
        return right

    def evaluate_teachers(self, teachers: Sequence[Params]) -> list[EvalResult]:
        """Grade each teacher on its own problems."""
        specs = self.setup.teachers
        return [
            self.evaluate(
                spec, params, spec.slug, indices=self.setup.own_rows(self.setup.held_out, index)
            )
            for index, (spec, params) in enumerate(zip(specs, teachers, strict=True))
        ]


def make_generate(setup: Setup, spec: ModelSpec) -> Callable[..., Rollout]:
    """Jit the sampler of one model."""
    config = setup.config.rollout

    def run(params: Params, prompts: Prompts, sampling: Sampling, version: jax.Array) -> Rollout:
        return generate(
            spec.model,
            params,
            prompts,
            sampling,
            version,
            max_tokens=config.max_tokens,
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
) -> EvalResult:
    """Grade what `draw` answers to the rows of `indices`; each model reads its own template."""
    config = setup.config.eval
    sampling = setup.sampling("eval", temperature=config.temperature, top_p=config.top_p, spec=spec)
    own = spec in setup.teachers

    def answer(prompts: Prompts) -> Rollout:
        return draw(as_teacher(prompts) if own else prompts, sampling)

    return evaluate(
        answer,
        eval_prompts(setup.encoded, indices, samples, setup.config.eval_batch_size),
        lambda ids: decode(spec.tokenizer, ids.tolist()),
        lambda row: setup.rows[row].answer or "",
        samples,
        advance=advance,
        out=out,
    )


def as_teacher(prompts: Prompts) -> Prompts:
    """Give the prompts as each row's own teacher reads them."""
    return dataclasses.replace(
        prompts, tokens=prompts.teacher_tokens, length=prompts.teacher_length
    )
