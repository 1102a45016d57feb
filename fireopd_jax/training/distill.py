"""The loop of on-policy distillation.

    prompts -> generate -> score, filter, reweight -> update        three jitted programs a step
                                            '- describe             and one for what is logged

The host reports step t - 1 while the device works on step t. After the first step nothing
compiles: each step's count of compilations is among its metrics.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.method.filtering import window_of
from fireopd_jax.metrics import merge, results
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.schema import MethodConfig
from fireopd_jax.rollout.mixing import given_rows, mix, without
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runs.checkpoints import Checkpoints
from fireopd_jax.runs.completions import write_completions
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.session.session import Session
from fireopd_jax.sharding.mesh import by_rows, replicate, shard_rows
from fireopd_jax.text.chat import decode
from fireopd_jax.training.alarms import Alarms
from fireopd_jax.training.loop import run_steps
from fireopd_jax.training.programs import Beside, Programs, make_programs
from fireopd_jax.training.update import Metrics, TrainState, init_state, learning_rate, skip_reason
from fireopd_jax.types import Array, Batch, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step leaves on the device for the report."""

    metrics: Metrics
    batch: Batch
    keep: jax.Array
    compilations: int


class Distillation:
    """One student learning by one method, its record under `home`."""

    def __init__(
        self,
        session: Session,
        method: MethodConfig,
        teachers: Sequence[Params],
        start: Params,
        base: Params | None,
        home: Path,
        name: str,
    ):
        config = session.setup.config
        self.session, self.config, self.home, self.name = session, config, home, name
        # What they say of their own end, where that stands for the student's.
        self.teachers = [
            spec.scoring(session.setup.student).exchanged(params)
            for spec, params in zip(session.setup.teachers, teachers, strict=True)
        ]
        self.programs: Programs = make_programs(session.setup, method, config.optim)
        updates = config.run.steps * config.run.updates_per_rollout
        self.learning_rate = learning_rate(config.optim, updates)
        self.sampling = session.setup.sampling(
            "rollout",
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            min_p=config.rollout.min_p,
            min_tokens=config.rollout.min_tokens,
        )
        self.temperature = jnp.float32(config.rollout.temperature)
        self.loader = PromptLoader(
            session.setup.encoded,
            session.setup.train,
            prompts_per_step=config.rollout.batch_size // config.rollout.group_size,
            group_size=config.rollout.group_size,
            seed=seed_for(config.run.seed, "prompts"),
            references=config.rollout.on_policy_fraction < 1,
        )
        self.mix = jax.jit(mix, out_shardings=by_rows(session.setup.mesh))
        self.start = start
        # Who is not read is not passed: the programs would hold on to it.
        self.adapted = start if config.student.lora is not None else None
        self.base = (start if base is None else base) if method.score.base else None
        self.graded = method.score.margin is not None
        self.lent = self.teachers[0] if method.loss.divergence_from_teacher is not None else None
        window = window_of(method.filter)
        shape = window, config.rollout.batch_size, 2
        self.recent = jnp.full(shape, jnp.nan, jnp.float32) if window else None
        self.counter = CompileCounter()
        self.alarms = Alarms()
        self.reported = time.monotonic()

    def run(self) -> Params:
        """Train to the end, from the newest checkpoint if there is one."""
        run = self.config.run
        self.home.mkdir(parents=True, exist_ok=True)
        learner = self.programs.learner(self.start)
        state = init_state(learner, self.programs.optimizer, self.recent)
        state = replicate(self.session.setup.mesh, state)
        self.checkpoints = Checkpoints(
            self.home / "checkpoints", keep=run.keep, keep_best=run.keep_best
        )
        done = 0
        if self.checkpoints.latest() is not None:
            done, state, position = self.checkpoints.restore(state)
            self.loader.set_state(position)
            self.session.log(f"{self.name}: goes on from step {done} of {run.steps}")
        self.applied = int(state.updates - state.skipped)
        with Tracker(self.home) as self.tracker:
            self.tracker.truncate(done + 1 if done else 0)
            if done == 0:
                self._evaluate(0, state)
            state = run_steps(
                f"distil {self.name}",
                state,
                done,
                run.steps,
                self.advance,
                self.report,
                self.after,
                self.session.stop,
                self._saves,
            )
        self.checkpoints.close()
        if skipped := int(state.skipped):
            self.session.log(f"{self.name}: {skipped} of {int(state.updates)} updates were skipped")
        return self.programs.whole(self.start, state.params)

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Step]:
        """Dispatch one step; nothing is waited for."""
        before = self.counter.count
        prompts = next(self.loader)
        params = self.programs.whole(self.start, state.params)
        rollout = self._rollout(params, prompts, state.updates)
        correct = self.session.grades(rollout) if self.graded else None
        beside = Beside(self.base, state.recent, correct)
        batch, keep, metrics, recent = self.programs.score(
            params, self.teachers, rollout, self.temperature, state.updates, beside
        )
        del params  # a merged copy makes room for the update
        state = dataclasses.replace(state, recent=recent)
        updates = []
        for _ in range(self.config.run.updates_per_rollout):
            state, update = self.programs.update(
                state, batch, self.temperature, self.adapted, self.lent
            )
            updates.append(update)
        return state, Step(
            metrics=self.programs.describe(batch, keep) | metrics | _joined(updates),
            batch=batch,
            keep=keep,
            compilations=self.counter.count - before,
        )

    def _rollout(self, params: Params, prompts: Prompts, version: Array) -> Rollout:
        """Draw responses; where rows learn from given ones, those take their place."""
        student, fraction = self.session.setup.student, self.config.rollout.on_policy_fraction
        if fraction == 1:
            return self.session.generate(student, params, prompts, self.sampling, version)
        given = given_rows(prompts, fraction, seed_for(self.config.run.seed, "on-policy"))
        own = without(prompts, given)
        rollout = self.session.generate(student, params, own, self.sampling, version)
        return self.mix(rollout, shard_rows(self.session.setup.mesh, prompts), given)

    def report(self, done: int, step: Step) -> dict[str, object]:
        """Write a finished step's metrics and samples; tell what to show."""
        run = self.config.run
        values = results(step.metrics)
        values.update(self._derived(done, values, step))
        for alarm in self.alarms.check(values):
            self.session.log(f"{self.name}: step {done}: {alarm}")
        if values["skipped"]:
            self.session.log(f"{self.name}: step {done} skipped: {skip_reason(values)}")
        if done % run.log_every == 0 or done == run.steps:
            self.tracker.log(done, values)
        if run.completions_every and (done % run.completions_every == 0 or done == run.steps):
            file = self.home / "completions" / f"step_{done:06d}.parquet"
            setup = self.session.setup
            write_completions(
                file,
                step.batch,
                step.keep,
                rows=setup.rows,
                teachers=list(setup.config.teachers),
                decode=functools.partial(decode, setup.student.tokenizer),
            )
        return {
            "kl": values["distill/reverse_kl"],
            "length": values["completions/mean_length"],
            "tok/s": values["perf/tokens_per_s"],
        }

    def _derived(self, done: int, values: dict[str, float], step: Step) -> dict[str, float]:
        now = time.monotonic()
        seconds, self.reported = now - self.reported, now
        # The schedule counts the updates that were applied.
        self.applied += round((1 - values["skipped"]) * self.config.run.updates_per_rollout)
        square = values.pop("fire/token_weight_square")
        mean = values["fire/token_weight_mean"]
        spread = values.pop("distill/advantage_square") - values["distill/reverse_kl"] ** 2
        return {
            "learning_rate": float(np.asarray(self.learning_rate(max(self.applied - 1, 0)))),
            "fire/token_weight_ess": mean**2 / square if square else float("nan"),
            "distill/advantage_std": max(spread, 0.0) ** 0.5,
            "timing_s/step": seconds,
            "perf/tokens_per_s": values["num_tokens"] / max(seconds, 1e-9),
            "perf/compilations": step.compilations,
        }

    def after(self, done: int, state: TrainState, stopping: bool) -> None:
        """Evaluate and save where it is time."""
        score = self._evaluate(done, state)
        if stopping or self._saves(done):
            metrics = None if score is None else {"score": score}
            state = self.programs.copy(state)
            self.checkpoints.save(done, state, self.loader.get_state(), metrics)
        if stopping:
            self.checkpoints.close()

    def _saves(self, done: int) -> bool:
        run = self.config.run
        return done % run.save_every == 0 or done == run.steps or self._grades(done)

    def _grades(self, done: int) -> bool:
        config, run = self.config.eval, self.config.run
        due = config.every and (done % config.every == 0 or done == run.steps)
        return bool(due and config.problems)

    def _evaluate(self, done: int, state: TrainState) -> float | None:
        """Grade the student now and then, one response a problem."""
        if not self._grades(done):
            return None
        config, setup = self.config.eval, self.session.setup
        result = self.session.evaluate(
            setup.student,
            self.programs.whole(self.start, state.params),
            f"{self.name}_step_{done:06d}",
            indices=setup.held_out[: config.every_problems],
            samples=1,
            quiet=True,
        )
        self.tracker.log(done, {"eval/held_out/avg@1": result.mean})
        return result.mean


def _joined(updates: Sequence[Metrics]) -> Metrics:
    joined = updates[0]
    for update in updates[1:]:
        joined = merge(joined, update)
    return joined
