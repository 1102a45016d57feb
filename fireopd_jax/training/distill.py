"""The loop of on-policy distillation.

    prompts -> rollout -> refine -> score, filter, reweight -> update      three jitted programs
                                                            '- describe    and one for metrics

The host reports step t - 1 while the device runs step t. After the first step nothing compiles;
the metric `perf/compilations` counts each step's compilations.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fireopd_jax.config import NothingLearnt, UserError
from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.method.batch import Assembled
from fireopd_jax.metrics import Metrics, merge
from fireopd_jax.models.language_model import Params
from fireopd_jax.models.placement import Placement
from fireopd_jax.rollout.mixing import given_rows, mix, without
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.runs.checkpoints import Checkpoints
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.runtime.clock import StageClock
from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.session.contexts import teacher_specs
from fireopd_jax.session.host import Policies
from fireopd_jax.session.parameters import placed, waiting
from fireopd_jax.session.refining import host_stages
from fireopd_jax.session.session import Session
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.sharding.mesh import by_rows, replicate, shard_rows
from fireopd_jax.sharding.offload import on_devices
from fireopd_jax.terminal.progress import progress
from fireopd_jax.terminal.working import LONG_S, working
from fireopd_jax.training.evaluations import StepEvaluations
from fireopd_jax.training.in_flight import InFlight
from fireopd_jax.training.loop import StepLoop
from fireopd_jax.training.plan import MethodPlan
from fireopd_jax.training.prepare import StudentStart
from fireopd_jax.training.reports import Step, StepReports
from fireopd_jax.training.state import StateInFlight, TrainState
from fireopd_jax.training.windows import Windows
from fireopd_jax.types import Rollout, TopTokens


class Distillation:
    """Distillation of one student by one method; metrics and checkpoints go to `home`."""

    def __init__(
        self,
        session: Session,
        plan: MethodPlan,
        teachers: Sequence[Params],
        start: StudentStart,
        base: Params | None,
        home: Path,
        name: str,
    ):
        config, setup = session.setup.config, session.setup
        method = plan.method
        self.session, self.config, self.home, self.name = session, config, home, name
        self.method = method
        self.teachers: Sequence[Params] = teachers if method.teacher.resident else ()
        self.specs = teacher_specs(setup, method)
        self.scorers = [
            self._scorer(spec, params)
            for spec, params in zip(self.specs, self.teachers, strict=not method.teacher.own)
        ]
        """Parameters of frozen teachers, with EOS rows swapped where an alias asks for it."""
        self.programs = plan.programs
        knobs = config.rollout
        self.decoded = method.score.student == "decode"
        """Whether the student's scores come from the decoding steps."""
        self.sampling = setup.sampling(
            "rollout",
            temperature=knobs.temperature,
            top_p=knobs.top_p,
            top_k=knobs.top_k,
            min_p=knobs.min_p,
            min_tokens=knobs.min_tokens,
            entropy=self.decoded,
        )
        self.temperature = jnp.float32(method.score.temperature or knobs.temperature)
        encoded = plan.encoded
        if dropped := len(np.setdiff1d(setup.train, encoded.kept)):
            session.log(
                f"{name}: {dropped} training rows lack a text of the method, or are too long"
            )
        self.loader = PromptLoader(
            encoded,
            setup.train,
            prompts_per_step=knobs.batch_size // knobs.group_size,
            group_size=knobs.group_size,
            seed=seed_for(config.run.seed, "prompts"),
            references=knobs.on_policy_fraction < 1,
        )
        self.in_flight = None
        if plan.programs.draw is not None:
            self.in_flight = InFlight(setup, encoded, plan.programs.draw)
        self.mix = jax.jit(mix, out_shardings=by_rows(setup.mesh))
        self.host_stages = host_stages(session, method)
        # Pass None for unused inputs, so that the programs do not keep them alive.
        self.start, self.adapted, self.base = start, None, None
        if config.student.lora is not None:
            self.adapted = start.hold()
        if method.score.needs_base:
            self.base = start.hold() if base is None else base
        self.began = start.hold() if method.teacher.at_start else None
        self.moving = method.teacher.own and self.began is None and self.adapted is None
        """Whether parameters that each update replaces are the teacher's."""
        self.windows = Windows(
            home / "rollouts",
            knobs.window,
            config.run.steps,
            mesh=setup.mesh,
            stop=session.stop,
        )
        self.counter = CompileCounter()

    def run(self) -> Params:
        """Train to the last step, from the newest checkpoint if any; return the parameters."""
        run, label = self.config.run, f"distil {self.name}"
        self.home.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(
            self.home / "checkpoints", keep=run.keep, keep_best=run.keep_best
        )
        done, state = self._begin()
        reporter = self.session.trackers.reporter(self.name)
        with (
            Tracker(self.home, reporter) as self.tracker,
            StageClock(done) as self.clock,
            progress(label, run.steps, start=done) as advance,
            self.session.stop.held(),
        ):
            self.tracker.truncate(done + 1 if done else 0)
            self.evaluations = StepEvaluations(self.session, self.name, self.tracker)
            # Of a resumed run: those that a stop or a kill after the save has prevented.
            self._evaluate(done, state)
            applied = int(state.updates - state.skipped)
            report = StepReports(
                self.session, self.method, self.tracker, self.clock, self.home, self.name, applied
            )
            stop = self.session.stop
            loop = StepLoop(label, done, run.steps, report, stop=stop, advance=advance)
            for step in loop:
                compiled = self.counter.count
                policies = self.policies(state)
                with self._kept(step, state, loop):
                    rollout = self.windows.rollout(
                        step, partial(self.rollout, policies), partial(self.refine, policies)
                    )
                    compiling = working(f"compiling score and update of {self.name}", after=LONG_S)
                    with compiling if step == done else nullcontext():
                        scored = self.score(policies, rollout, state)
                        judge = self.judge(policies.teachers)
                stages, top = state.stages, self.top_tokens(policies, rollout, step + 1)
                del policies  # frees merged copies of the adapters before the update
                state, metrics = self.update(judge, state, scored)
                del judge
                served = self.session.served_stats()
                left = Step(metrics, scored, stages, self.counter.count - compiled, served, top)
                try:
                    due = self._saves(step + 1) or self.evaluations.any_due(step + 1)
                    loop.dispatched(step + 1, left, flush=due)
                except NothingLearnt:
                    self.save(step + 1, state)
                    self.checkpoints.close()
                    raise
                self.after(step + 1, state, loop.stopping)
        self.checkpoints.close()
        if skipped := int(state.skipped):
            self.session.log(f"{self.name}: {skipped} of {int(state.updates)} updates were skipped")
        if self.in_flight is not None and (left := self.in_flight.count()):
            self.session.log(f"{self.name}: {left} responses in flight are not learned from")
        report.log_seconds()
        report.guard.end(int(state.updates), int(state.skipped))
        return self.programs.merged_params(self.adapted, state.params)

    def _scorer(self, spec: ModelSpec, params: Params) -> Params:
        """Return the parameters that a frozen teacher scores with, where they wait."""
        model = spec.scoring(self.session.setup.student)
        if model.exchange is None:
            return params
        return waiting(spec, model.exchanged(on_devices(params)))

    def _begin(self) -> tuple[int, TrainState]:
        """Return steps done and state: of the newest checkpoint, else of the start parameters."""
        run = self.config.run
        if self.checkpoints.latest() is None:
            # Adapters keep the start; training of all parameters donates its buffers.
            start = self.adapted if self.adapted is not None else self.start.take()
            return 0, self.programs.init(start)
        self.start.release()
        shapes = jax.eval_shape(
            lambda params: self._with_rows(self.programs.init(params)), self.start.shapes
        )
        like = placed(shapes, Placement(self.session.setup.mesh))
        done, state, position = self.checkpoints.restore(like)
        if self.in_flight is not None:
            state, rows = state.taken_apart()
            self.in_flight.rows = shard_rows(self.session.setup.mesh, rows)
        self.loader.set_state(position)
        self.session.log(f"{self.name}: resuming from step {done} of {run.steps}")
        return done, state

    @contextmanager
    def _kept(self, done: int, state: TrainState, loop: StepLoop) -> Iterator[None]:
        """Save the state before the step in the block if that is stopped, by a spent budget say."""
        try:
            yield
        except (Interrupted, UserError, KeyboardInterrupt):
            with self.session.stop.saving():
                loop.flush()
                self.save(done, state)
                self.checkpoints.close()
            raise

    def policies(self, state: TrainState) -> Policies:
        """Return the parameters of the student and of the method's teachers in this step."""
        student = self.programs.merged_params(self.adapted, state.params)
        teachers = self.teachers
        if self.began is not None:
            teachers = (self.began,)
        elif state.average is not None:
            teachers = (self.programs.merged_params(self.adapted, state.average),)
        elif self.method.teacher.own:
            teachers = (student,)
        return Policies(student, teachers, state.updates)

    def rollout(self, policies: Policies, step: int) -> Rollout:
        """Sample the responses of a step; rows to be trained on references get those instead."""
        self.loader.seek(step)
        prompts, params, updates = next(self.loader), policies.student, policies.updates
        student, fraction = self.session.setup.student, self.config.rollout.on_policy_fraction
        with self.clock.stage("rollout") as ready:
            if self.in_flight is not None:
                mesh = self.session.setup.mesh
                drawn = self.in_flight.draw(
                    params, shard_rows(mesh, prompts), self.sampling, replicate(mesh, updates)
                )
            elif fraction == 1:
                drawn = self.session.generate(
                    student, params, prompts, self.sampling, updates, policy=self.decoded
                )
            else:
                given = given_rows(prompts, fraction, seed_for(self.config.run.seed, "on-policy"))
                own = without(prompts, given)
                drawn = self.session.generate(student, params, own, self.sampling, updates)
                drawn = self.mix(drawn, shard_rows(self.session.setup.mesh, prompts), given)
            ready(drawn.finished)
        return drawn

    def refine(self, policies: Policies, rollout: Rollout) -> Rollout:
        """Run the method's host stages, which block on the rollout; most methods have none."""
        if self.host_stages:
            jax.block_until_ready(rollout.finished)  # which is the rollout's time, not theirs
        for stage in self.host_stages:
            with self.clock.host("refine"):
                rollout = stage(rollout, policies)
        return rollout

    def score(self, policies: Policies, rollout: Rollout, state: TrainState) -> Assembled:
        """Score the rollout by student and teachers, then filter and reweight it."""
        with self.clock.stage("score") as ready:
            scored = self.programs.score(
                policies.student,
                self.scoring(policies),
                rollout,
                self.temperature,
                state.updates,
                state.stages,
                self.base,
            )
            ready(scored.keep)
        return scored

    def scoring(self, policies: Policies) -> list[Params]:
        """Return the parameters of the teachers that score, on the devices."""
        return [on_devices(params) for params in self.scorers or policies.teachers]

    def top_tokens(self, policies: Policies, rollout: Rollout, done: int) -> TopTokens | None:
        """Return the models' most probable tokens in a step whose responses are saved with them."""
        program = self.programs.top_tokens
        if program is None or not self.config.run.saves_responses(done):
            return None
        teachers = self.scoring(policies) if self.method.score.scores_teacher else []
        with self.clock.stage("top_tokens") as ready:
            found = program(policies.student, teachers, rollout, self.temperature)
            ready(found.student_ids)
        return found

    def judge(self, teachers: Sequence[Params]) -> Params | None:
        """Return the parameters that the loss's exact divergence is from, if it has one."""
        judge = self.method.loss.judge(self.scorers or teachers, self.base)
        if judge is not None and self.moving:  # its buffers are donated with the state
            judge = jax.tree.map(jnp.copy, judge)
        return judge if judge is None else on_devices(judge)

    def update(
        self, judge: Params | None, state: TrainState, scored: Assembled
    ) -> tuple[TrainState, Metrics]:
        """Run `updates_per_rollout` optimizer steps on one batch."""
        state = dataclasses.replace(state, stages=scored.states)
        with self.clock.stage("update") as ready:
            metrics: Metrics | None = None
            for _ in range(self.config.run.updates_per_rollout):
                state, one = self.programs.update(
                    state, scored.batch, self.temperature, self.adapted, judge
                )
                metrics = one if metrics is None else merge(metrics, one)
            assert metrics is not None
            described = self.programs.describe(scored.batch, scored.keep)
            ready(metrics["skipped"].total)
        of_rows = {} if self.in_flight is None else self.in_flight.step_done()
        return state, described | scored.metrics | of_rows | metrics

    def after(self, done: int, state: TrainState, stopping: bool) -> None:
        """Save and evaluate if due; the seconds are reported with the next step.

        Saved first: a run that stops, or is killed, during the evaluation makes it when resumed.
        """
        self.clock.next()
        if stopping or self._saves(done):
            self.save(done, state)
        if stopping and done < self.config.run.steps:
            with self.session.stop.saving():
                self.checkpoints.close()
        else:
            self._evaluate(done, state)

    def save(self, done: int, state: TrainState) -> None:
        """Write a checkpoint after `done` steps, unless there is one."""
        if done == 0 or done in self.checkpoints.steps():
            return
        self.loader.seek(done)
        with self.session.stop.saving(), self.clock.host("save"):
            self.checkpoints.save(done, self._with_rows(state), self.loader.get_state())
        # Only the newest ones are resumed from; the best may be much older.
        self.windows.forget(before=min(self.checkpoints.steps()[-self.config.run.keep :]))

    def _with_rows(self, state: TrainState) -> TrainState:
        """Return the state as it is saved: with the rows in flight, if any."""
        if self.in_flight is None:
            return state
        return StateInFlight.of(state, self.in_flight.rows)

    def _saves(self, done: int) -> bool:
        run = self.config.run
        return done % run.save_every == 0 or done == run.steps or self.evaluations.due(done)

    def _evaluate(self, done: int, state: TrainState) -> None:
        """Evaluate the student on what is due; a checkpoint gets its avg@1 on held-out problems."""
        if not self.evaluations.any_due(done):
            return
        try:
            with self.clock.host("eval"):
                score = self.evaluations(
                    done, lambda: self.programs.merged_params(self.adapted, state.params)
                )
        except (Interrupted, KeyboardInterrupt):
            with self.session.stop.saving():
                self.save(done, state)
                self.checkpoints.close()
            raise
        if score is not None and self.config.run.keep_best and done in self.checkpoints.steps():
            self.checkpoints.rate(done, {"score": score})
