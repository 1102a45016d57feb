"""Every family of objectives on every mesh: the keep masks, losses and gradients of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.scoring import TopK
from fireopd_jax.models.placement import Placement
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, shard_rows
from fireopd_jax.verify import cases, invariance
from tests.cases import random_params, scored
from tests.sharding.meshes import MESHES, MODELS, assert_close

METHODS = {
    "eopd": "entropy_aware",
    "fire_opd": "sampled_reverse_kl",
    "gkd": "vocabulary_divergence",
    "local_support": "support_divergence",
    "minillm": "minillm",
    "omniopd": "chunk_policy_gradient",
    "opsa": "opsa",
    "power_opd": "sampled_power",
    "tip": "vocabulary_divergence",  # with the divergence of each token among the scores
}
"""Shipped methods, and the kinds of their losses."""
ALWAYS = {("fire_opd", "tensor"), ("gkd", "all"), ("local_support", "tensor")}


def marked(*of):
    return pytest.param(*of, marks=() if of in ALWAYS else pytest.mark.slow)


def test_these_are_the_losses_of_all_shipped_methods():
    shipped = {load_config(["smoke", f"method/{name}"]).method.loss.kind
               for name in invariance.shipped_methods()}  # fmt: skip
    assert shipped == set(METHODS.values())


@pytest.fixture(scope="module")
def programs():
    return invariance.Programs()


@pytest.mark.parametrize(
    ("name", "mesh"), [marked(name, mesh) for name in METHODS for mesh in MESHES]
)
def test_keep_masks_losses_and_gradients_are_those_of_one_device(programs, name, mesh):
    method, model = load_config(["smoke", f"method/{name}"]).method, cases.bigram()
    rollout = cases.small_rollout(16)
    models = invariance.Models(model, *(cases.random_params(model, seed) for seed in range(3)))
    on = make_mesh(MeshConfig(**MESHES[mesh]))
    batch, wanted = programs.run(models, method, rollout, tokens=invariance.PACK)
    spread, found = programs.run(
        models.on(on), method, shard_rows(on, rollout), tokens=invariance.PACK
    )
    assert 0 < np.count_nonzero(batch.coefficient) <= rollout.mask.sum()
    np.testing.assert_allclose(spread.coefficient, batch.coefficient, rtol=1e-6)
    np.testing.assert_allclose(spread.weight, batch.weight, rtol=1e-5, atol=1e-6)
    assert_close(found["gradient"], wanted["gradient"], 1e-5)
    assert float(found["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [None, 32])
@pytest.mark.parametrize("mesh", ["all", "tensor"])
def test_routed_teachers_one_of_them_in_int8_score_as_on_one_device(mesh, tokens):
    model, on = MODELS["dense"], make_mesh(MeshConfig(**MESHES[mesh]))
    eight = dataclasses.replace(model, quantize="int8")
    params = random_params(model, 1)
    trees = [random_params(model), params, quantize_params(params)]
    rollout = cases.small_rollout(16)
    prompts = rollout.prompts
    prompts = dataclasses.replace(
        prompts,
        tokens=prompts.tokens % 32,
        teacher_tokens=prompts.teacher_tokens % 32,
        teacher=prompts.row.astype(np.int32) % 2,
    )
    rollout = dataclasses.replace(rollout, prompts=prompts, tokens=rollout.tokens % 32)

    def run(mesh):
        place = (
            (lambda x: x) if mesh is None else lambda x: jax.device_put(x, Placement(mesh).of(x))
        )
        stage = TopK(k=4, micro_batch_tokens=tokens)

        def scores(student, one, other, rollout):
            teachers = [(model, one), (eight, other)]
            return scored(stage, (model, student), teachers, rollout, mesh=mesh)

        rows = rollout if mesh is None else shard_rows(mesh, rollout)
        return jax.jit(scores)(*map(place, trees), rows)

    wanted, found = run(None), run(on)
    np.testing.assert_array_equal(found.support.ids, wanted.support.ids)
    mask = jnp.asarray(rollout.mask)
    for one, other in (
        (found.student.logprob, wanted.student.logprob),
        (found.teacher.logprob, wanted.teacher.logprob),
        (found.teacher.entropy, wanted.teacher.entropy),
    ):
        np.testing.assert_allclose(jnp.where(mask, one, 0), jnp.where(mask, other, 0), atol=1e-5)
