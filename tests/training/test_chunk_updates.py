"""Audited chunks in the programs of a run: the base policy stays, with and without adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.bench.methods import random_rollout
from fireopd_jax.metrics import results
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session import refining
from fireopd_jax.session.setup import set_up
from fireopd_jax.sharding.mesh import replicate, shard_rows
from fireopd_jax.training.programs import make_programs
from fireopd_jax.training.run import train
from fireopd_jax.verify.cases import make_audit

METHOD = (
    "method={score: {kind: chunk_agreement}, loss: {kind: chunk_policy_gradient, beta: 0.5}, "
    "filter: {kind: keep_all}, reweight: {kind: uniform}, aggregate: token}"
)
SMALL = [
    "smoke",
    METHOD,
    "method.refine={kind: audit}",
    "mesh.data=1",
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=12",
    "eval.problems=0",
    "run.steps=2",
]
LORA = "student.lora={rank: 2}"


@pytest.mark.parametrize("more", [[], [LORA]], ids=["all", "lora"])
def test_updates_leave_the_base_policy_as_it_was(more):
    config = load_config([*SMALL, *more])
    setup = set_up(config)
    programs = make_programs(setup, config.method, config.optim)
    start = replicate(setup.mesh, jax.jit(setup.student.model.init)(jax.random.key(0)))
    adapted = start if more else None
    state = programs.init(start if more else jax.tree.map(jnp.copy, start))
    rollout = random_rollout(setup)
    audit = shard_rows(setup.mesh, make_audit(np.asarray(rollout.mask).sum(axis=1)))
    rollout = dataclasses.replace(rollout, audit=audit)
    one, kl = jnp.float32(1), []
    for _ in range(3):
        params = programs.merged_params(adapted, state.params)
        scored = programs.score(params, [start], rollout, one, state.updates, state.stages, start)
        state, metrics = programs.update(state, scored.batch, one, adapted, start)
        values = results(metrics | programs.describe(scored.batch, scored.keep))
        kl.append(values["audit/base_kl"])
        assert values["skipped"] == 0 and values["grad_norm"] > 0
    # The base policy is the student at its start.
    assert kl[0] < 1e-6 < kl[1] and kl[1] < kl[2]
    assert values["audit/chunks"] > 1 and 0 < values["audit/target"] < 1
    assert not any("teacher" in name for name in values)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], [LORA]], ids=["all", "lora"])
def test_a_run_with_audits_set_by_a_host_stage(more, tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Agree:
        session: object
        method: object
        gives = frozenset({"rollout.audit"})

        def __call__(self, rollout, policies):
            audit = make_audit(np.asarray(rollout.mask).sum(axis=1))
            return dataclasses.replace(rollout, audit=shard_rows(self.session.setup.mesh, audit))

    monkeypatch.setattr(refining, "HOST_STAGES", (Agree,))
    train(load_config([*SMALL, *more, f"run.dir={tmp_path}/run"]))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in trained)
    assert trained[0]["audit/base_kl"] < 1e-6 and trained[1]["audit/base_kl"] > 0
    assert trained[-1]["perf/compilations"] == 0
