"""What is reported of each step: metrics, warnings, trajectories, values for the progress.

outputs of a step -> metrics.jsonl, completions/, log, progress
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fireopd_jax.method.batch import Assembled, StageStates
from fireopd_jax.method.config import MethodConfig
from fireopd_jax.metrics import Metrics, results
from fireopd_jax.runs.completions import Texts, on_host, write_completions
from fireopd_jax.runs.tracking import Tracker, record_alarm
from fireopd_jax.runtime.clock import StageClock
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.session.contexts import teacher_names
from fireopd_jax.session.session import Session
from fireopd_jax.text.chat import decode
from fireopd_jax.text.pieces import Pieces
from fireopd_jax.training.alarms import Alarms
from fireopd_jax.training.guard import Guard
from fireopd_jax.training.optimizer import learning_rate
from fireopd_jax.training.programs import context_of
from fireopd_jax.training.samples import Samples, samples
from fireopd_jax.training.update import skip_reason
from fireopd_jax.types import TopTokens

STAGES = ("rollout", "refine", "score", "update")
"""The stages of a step; the time of evaluation, saving and compilation is counted separately."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Outputs of one step that its report needs; arrays still on the device."""

    metrics: Metrics
    scored: Assembled
    stages: StageStates
    """States of the filter and the reweighting that the batch was assembled with."""
    compilations: int
    served: Mapping[str, float]
    """Counters of requests to served teachers so far."""
    top: TopTokens | None = None


class StepReports:
    """Reports the steps of one student, or control, `name`; files go to `home`."""

    def __init__(
        self,
        session: Session,
        method: MethodConfig,
        tracker: Tracker,
        clock: StageClock,
        home: Path,
        name: str,
        applied: int,
    ):
        self.session, self.method, self.name, self.home = session, method, name, home
        self.config, self.log = session.setup.config, session.log
        self.tracker, self.clock, self.alarms = tracker, clock, Alarms()
        self.guard = Guard(name, self.config.run.max_nonfinite)
        self.reporter = session.trackers.reporter(name)
        self.samples, self.pieces = Samples(), Pieces(session.setup.student.tokenizer)
        self.applied = applied
        """Number of updates that were not skipped."""
        updates = self.config.run.steps * self.config.run.updates_per_rollout
        self.learning_rate = learning_rate(self.config.optim, updates)
        self.reported = time.monotonic()

    def __call__(self, done: int, step: Step) -> dict[str, object]:
        """Write a finished step's metrics and completions; return the values for the progress."""
        run = self.config.run
        values = results(step.metrics)
        values.update(self._derived(done, values, step))
        for alarm in self.alarms.check(values):
            self.log(f"{self.name}: step {done}: {alarm.text}")
            record_alarm(self.home, {"step": done} | dataclasses.asdict(alarm))
        if values["skipped"]:
            self.log(f"{self.name}: step {done} skipped: {skip_reason(values)}")
        if done % run.log_every == 0 or done == run.steps:
            self.tracker.log(done, values)
        setup, asked = self.session.setup, run.saves_responses(done)
        if self.samples.due(asked):
            own = partial(decode, setup.student.tokenizer)
            for text in samples(step.scored.batch, setup.rows, own, setup.grader):
                self.log(f"{self.name}: a response of step {done}:\n{text}")
        if asked:
            responses = self._write_completions(done, step)
            if self.reporter is not None:
                self.reporter.table(done, responses)
        shown: dict[str, object] = {}
        if "distill/reverse_kl" in values:
            shown["kl"] = values["distill/reverse_kl"]
        shown["length"] = values["completions/mean_length"]
        self.guard.check(done, values)
        return shown | {"tok/s": values["perf/tokens_per_s"]}

    def _write_completions(self, done: int, step: Step) -> list[dict[str, Any]]:
        """Write the trajectories of a step; return its rows."""
        setup, method = self.session.setup, self.method
        batch, keep = on_host(step.scored.batch), fetched(step.scored.keep)
        updates = (done - 1) * self.config.run.updates_per_rollout
        context = context_of(setup, method, batch.rollout, updates)
        states = fetched(step.stages)
        judged = method.filter.judged(batch.scores, context, keep, states.filter)
        texts = Texts(
            rows=setup.rows,
            teachers=teacher_names(setup, method) or [""],
            decode=partial(decode, setup.student.tokenizer),
            pieces=self.pieces,
            grader=setup.grader,
        )
        return write_completions(
            self.home / "completions" / f"step_{done:06d}.parquet",
            batch,
            keep,
            texts,
            judged=judged,
            measured=method.reweight.measured(batch.scores, context, keep),
            top=fetched(step.top),
        )

    def _derived(self, done: int, values: dict[str, float], step: Step) -> dict[str, float]:
        """Return metrics derived on the host: rates, seconds, standard deviations."""
        stages = self.clock.take(done - 1)
        now = time.monotonic()
        apart = sum(seconds for name, seconds in stages.items() if name not in STAGES)
        seconds, self.reported = max(now - self.reported - apart, 0.0), now
        # The schedule counts the updates that were applied.
        self.applied += round((1 - values["skipped"]) * self.config.run.updates_per_rollout)
        square = values.pop("method/token_weight_square")
        mean = values["method/token_weight_mean"]
        out = {
            "learning_rate": float(np.asarray(self.learning_rate(max(self.applied - 1, 0)))),
            "method/token_weight_ess": mean**2 / square if square else float("nan"),
            "timing_s/step": seconds,
            "perf/tokens_per_s": values["num_tokens"] / max(seconds, 1e-9),
            "perf/compilations": step.compilations,
        }
        if (second := values.pop("distill/advantage_square", None)) is not None:
            spread = second - values["distill/reverse_kl"] ** 2
            out["distill/advantage_std"] = max(spread, 0.0) ** 0.5
        out |= step.served
        return out | {f"timing_s/{name}": seconds for name, seconds in sorted(stages.items())}

    def log_seconds(self) -> None:
        """Log the seconds of each stage in this process."""
        self.clock.take(self.clock.step)
        spent = sorted(self.clock.totals.items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent)
        if shown:
            self.log(f"{self.name}: {shown}")
