"""Rows in flight between the steps of a run with `rollout.overprovision`.

    rows in flight, prompts of a step -> draw -> responses that have ended, the other rows
    the step is done                  -> the other rows are in flight

A step that is stopped before its end is drawn again from the same rows.
"""

import dataclasses
from typing import Any

import jax

from fireopd_jax.data.examples import example_prompts
from fireopd_jax.data.pipeline import Encoded
from fireopd_jax.metrics import Metrics
from fireopd_jax.models.language_model import Params
from fireopd_jax.rollout.overprovision import Carried, generate_overprovisioned, nothing_carried
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.session.setup import Setup
from fireopd_jax.sharding.mesh import by_rows, replicated, shard_rows
from fireopd_jax.types import Array, Prompts, Rollout


def extra_rows(setup: Setup) -> int:
    """Return the number E of rows in flight: `rollout.overprovision`, as many on each device."""
    knobs, devices = setup.config.rollout, setup.mesh.size
    wanted = round(knobs.overprovision * knobs.batch_size)
    return -(-wanted // devices) * devices


def make_draw(setup: Setup) -> Any:
    """Return the jitted sampler of a step, which has the signature of its inner function."""
    knobs = setup.config.rollout

    def draw(
        params: Params, prompts: Prompts, carried: Carried, sampling: Sampling, version: jax.Array
    ) -> tuple[Rollout, Carried, Metrics]:
        return generate_overprovisioned(
            setup.student.model,
            params,
            prompts,
            carried,
            sampling,
            version,
            max_tokens=knobs.max_tokens,
            slots=knobs.slots,
            memory=knobs.cache,
            mesh=setup.mesh,
            group_size=knobs.group_size,
        )

    rows = by_rows(setup.mesh)
    return jax.jit(draw, out_shardings=(rows, rows, replicated(setup.mesh)))


def no_rows(setup: Setup, encoded: Encoded) -> Carried:
    """Return the rows in flight before the first step: none."""
    prompts = example_prompts(encoded, extra_rows(setup), references=False)
    return shard_rows(setup.mesh, nothing_carried(prompts, setup.config.rollout.max_tokens))


class InFlight:
    """The rows of one distillation that no step has learned from."""

    def __init__(self, setup: Setup, encoded: Encoded, draw: Any):
        self.rows, self._draw = no_rows(setup, encoded), draw
        self._later: tuple[Carried, Metrics] = (self.rows, {})

    def draw(self, params: Params, prompts: Prompts, sampling: Sampling, version: Array) -> Rollout:
        """Return the responses to learn from in a step."""
        rollout, left, metrics = self._draw(params, prompts, self.rows, sampling, version)
        self._later = left, metrics
        # A token of an earlier step has the statistics of that step's parameters.
        return dataclasses.replace(rollout, policy=None)

    def step_done(self) -> Metrics:
        """Return metrics of the step's rollout; from now on the rows that it left are in flight."""
        self.rows, metrics = self._later
        return metrics

    def count(self) -> int:
        """Return the number of rows in flight."""
        return int((self.rows.rows.prompts.length > 0).sum())
