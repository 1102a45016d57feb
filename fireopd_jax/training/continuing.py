"""Whether a run may go on with another configuration: more steps, moved files.

configuration of the folder, configuration now -> Changes

Paths may change where the run has recorded what they hold: the content is compared as the run is
opened. More steps are the same run, longer, where nothing depends on the number of steps.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fireopd_jax.config import Key, UserError, validate
from fireopd_jax.data.identity import recorded_rows
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.paths import absolute, with_paths
from fireopd_jax.recipe.schema import Config, as_tree, methods
from fireopd_jax.runs.changes import Changes, by_keys
from fireopd_jax.session.identity import SOURCES, START, recorded_sources
from fireopd_jax.training.optimizer import learning_rate

ADVICE = "--extend goes on all the same; or choose another run.dir"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Compares the configuration of a run's folder with the one that it is to go on with."""

    folder: Path
    extend: bool = False
    """Whether to go on with more steps even where that changes the course of the steps to come."""
    distils: bool = True
    """Whether the command trains the student on rollouts: others have no use for more steps."""

    def __call__(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
        """Return the changes; an older configuration has today's defaults for missing keys.

        One that this version cannot read differs in whatever keys differ.
        """
        try:
            old, new = validate(Config, dict(before), {}), validate(Config, dict(now), {})
        except UserError:
            return by_keys(before, now)
        recorded = recorded_rows(self.folder)
        old = absolute(old, Path.cwd() if recorded is None else Path(recorded["folder"]))
        extended = None
        judged = old
        if new.run.steps > old.run.steps:
            reasons = [] if self.extend else list(fixed_length(old))
            if not self.distils:
                reasons = ["only fireopd train and resume go on to more steps"]
            if reasons := [*unfinished_window(old), *reasons]:
                shown = f"run.steps was {old.run.steps}, is now {new.run.steps}, but "
                others = by_keys(as_tree(_with_steps(old, new)), as_tree(new)).refused
                refused = [shown + "; ".join(reasons), *others]
                return Changes(refused, advice=ADVICE)
            extended = old.run.steps
            judged = _with_steps(old, new)
        known = frozenset(recorded_sources(self.folder / SOURCES))
        judged, wanted = (_without_paths(each, known, recorded) for each in (judged, new))
        refused = list(by_keys(as_tree(judged), as_tree(wanted)).refused)
        if old.mesh != new.mesh and old.rollout.overprovision:
            refused.append("mesh: rows in flight (rollout.overprovision) stay on as many devices")
        every = by_keys(as_tree(old), as_tree(new))
        return Changes(
            refused,
            [each for each in (*every.refused, *every.allowed) if each not in refused],
            extended,
        )

    def effects(self, config: Config, extended: int) -> Iterator[str]:
        """Yield a line for each thing that more steps than `extended` change."""
        yield f"going on from {extended} to {config.run.steps} steps"
        old = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=extended))
        yield from fixed_length(old, config)


def fixed_length(config: Config, longer: Config | None = None) -> Iterator[str]:
    """Yield what depends on the number of steps of a run, as clauses.

    With the configuration of the `longer` run, say how it goes on.
    """
    optim, steps = config.optim, config.run.steps
    updates = steps * config.run.updates_per_rollout
    if optim.schedule != "constant":
        last = _at(optim, updates, updates)
        clause = f"optim.schedule={optim.schedule} ends after {steps} steps, at {last:.3g}"
        if longer is not None:
            more = longer.run.steps * config.run.updates_per_rollout
            clause += f"; now it goes on at {_at(optim, more, updates):.3g}"
        yield clause
    if any(method.follows_progress for method in methods(config)):
        yield "method.filter changes after a share of the run's steps, which comes later then"


def _at(optim: OptimConfig, updates: int, done: int) -> float:
    return np.asarray(learning_rate(optim, updates)(done)).item()


def unfinished_window(config: Config) -> Iterator[str]:
    """Yield a clause if the run ends within a window, whose other rollouts were never sampled."""
    window, steps = config.rollout.window, config.run.steps
    if steps % window:
        yield (
            f"it ended within a window of rollouts (rollout.window={window}), of which the others "
            "were never sampled; expected another run.dir"
        )


def _with_steps(old: Config, new: Config) -> Config:
    return dataclasses.replace(old, run=dataclasses.replace(old.run, steps=new.run.steps))


def _without_paths(
    config: Config, known: frozenset[str], recorded: Mapping[str, Any] | None
) -> Config:
    """Return the configuration without the paths whose content the run has recorded."""

    def change(key: Key, path: str) -> str:
        content = key[0] == "data" or (key[:2] == ("eval", "sets"))
        if content:
            return path if recorded is None or path.startswith("builtin:") else "(recorded)"
        role = key[0]
        name = START if role == "student" else f"teacher {key[1]}" if role == "teachers" else role
        return "(recorded)" if key[-1] == "path" and name in known else path

    return with_paths(config, change)
