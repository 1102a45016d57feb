"""Evaluations of a student during its training: on held-out problems and on `eval.sets`.

steps done -> what is due -> responses, grades -> eval/, metrics.jsonl
"""

import time
from collections.abc import Callable
from functools import partial

from fireopd_jax.models.language_model import Params
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.runtime.processes import by_leader
from fireopd_jax.session.session import Session, scores
from fireopd_jax.terminal.working import LONG_S, working

HELD_OUT_SCORE = "eval/held_out/avg@1"


class StepEvaluations:
    """Evaluates the student, or a control, `name`, and logs its figures."""

    def __init__(self, session: Session, name: str, tracker: Tracker):
        self.session, self.name, self.tracker = session, name, tracker
        self.config, self.steps = session.setup.config.eval, session.setup.config.run.steps

    def __call__(self, done: int, params: Callable[[], Params]) -> float | None:
        """Evaluate what is due after `done` steps and not in the metrics yet.

        Returns avg@1 on held-out problems, if due. Raises `Interrupted` after a signal.
        """
        self._on_sets(done, params)
        if not self.due(done):
            return None
        if (known := by_leader(lambda: self._known(done))) is not None:
            return known
        setup, start = self.session.setup, time.monotonic()
        problems = setup.held_out[: self.config.every_problems]
        said = f"evaluating {self.name} after {done} steps"
        with working(f"{said} on {len(problems)} problems", after=LONG_S):
            result = self.session.evaluate(
                setup.student, params(), self._step(done), indices=problems, samples=1, quiet=True
            )
        shown, seconds = scores(self._step(done), result.summary()), time.monotonic() - start
        self.session.log(f"{shown}, {seconds:.1f} s")
        self.tracker.log(done, {HELD_OUT_SCORE: result.mean})
        return result.mean

    def _known(self, done: int) -> float | None:
        return dict(self.tracker.history(HELD_OUT_SCORE)).get(done)

    def due(self, done: int) -> bool:
        """Return whether the held-out problems are evaluated after `done` steps."""
        every = self.config.every
        return bool(self.config.problems and every and (done % every == 0 or done == self.steps))

    def any_due(self, done: int) -> bool:
        """Return whether anything is evaluated after `done` steps."""
        return self.due(done) or any(
            opened.due(done, self.steps) for opened in self.session.setup.sets
        )

    def _on_sets(self, done: int, params: Callable[[], Params]) -> None:
        label = self._step(done)
        # The first and the last evaluation are those of the summary.
        if done == 0:
            label = "student_before"
        elif done == self.steps:
            label = "student_after" if self.name == "student" else f"control_{self.name}"
        session = self.session
        for opened in session.setup.sets:
            prefix = f"eval/{opened.name}"
            if not opened.due(done, self.steps):
                continue
            if not by_leader(partial(self.tracker.has, done, f"{prefix}/")):
                said = f"evaluating {self.name} after {done} steps on {opened.name}"
                with working(said, after=LONG_S):
                    figures = session.graded_set(
                        opened, session.setup.student, params, label, quiet=True
                    )
                self.tracker.log(done, {f"{prefix}/{key}": x for key, x in figures.items()})

    def _step(self, done: int) -> str:
        return f"{self.name}_step_{done:06d}"
