"""Parameters in bfloat16: a float32 copy keeps updates that rounding would lose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.lora import TARGETS, LoraConfig
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import gradients, make_update
from tests.cases import random_params, tiny_model
from tests.models.test_lora import BATCH

HALF = jnp.dtype(jnp.bfloat16)
EXPERTS = MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
WEIGHTS = {"w": jnp.asarray(np.linspace(0.5, 1.5, 8), jnp.bfloat16)}
SLOW = {"learning_rate": 1e-4, "weight_decay": 0.0, "clip_norm": None}


def moved(config, params, count=50):
    """Return the parameters after `count` steps with a constant gradient."""
    optimizer = make_optimizer(config, count)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params)
        steps, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, steps), state), None

    return jax.jit(
        lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=count)[0]
    )(params)  # fmt: skip


def test_a_master_copy_keeps_the_steps_that_rounding_loses():
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), WEIGHTS)
    exact, _ = moved(OptimConfig(**SLOW), wide)
    kept, (master, _) = moved(OptimConfig(**SLOW), WEIGHTS)
    lost, _ = moved(OptimConfig(**SLOW, master=False), WEIGHTS)
    # Each step is 1e-4, half a unit of bfloat16 is 1e-3 and more.
    np.testing.assert_array_equal(lost["w"], WEIGHTS["w"])
    np.testing.assert_allclose(master["w"], exact["w"], rtol=1e-6)
    assert kept["w"].dtype == HALF
    np.testing.assert_array_equal(kept["w"], exact["w"].astype(jnp.bfloat16))
    assert (kept["w"] != WEIGHTS["w"]).all()


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
def test_types_of_the_optimizer(moment):
    def types(config, params):
        leaves = jax.tree.leaves_with_path(make_optimizer(config, 5).init(params))
        named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if leaf.ndim]
        return sorted((".mu" in n, ".nu" in n, str(leaf.dtype)) for n, leaf in named)

    config = OptimConfig(moment_dtype=moment)
    moments = [(False, True, "float32"), (True, False, moment)]
    assert types(config, WEIGHTS) == [(False, False, "float32"), *moments]
    assert types(OptimConfig(moment_dtype=moment, master=False), WEIGHTS) == moments
    # Parameters in float32 are their own master.
    assert types(config, {"w": jnp.ones(3)}) == moments


@pytest.mark.parametrize("micro", [None, 2])
def test_an_update_keeps_the_types_and_adds_gradients_in_float32(micro):
    model = tiny_model(param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(model))
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-3, moment_dtype="bfloat16"), 5)
    state = init_state(params, optimizer)
    loss = SampledReverseKL()
    grads, _ = jax.jit(
        lambda p: gradients(model, loss, p, BATCH, micro_batch_size=micro)
    )(params)  # fmt: skip
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    update = jax.jit(make_update(model, loss, optimizer, micro_batch_size=micro))
    after, metrics = update(state, BATCH, jnp.float32(1))
    assert metrics["skipped"].total == 0
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    master = after.opt_state[0]
    for narrow, wide in zip(jax.tree.leaves(after.params), jax.tree.leaves(master), strict=True):
        np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def orthogonalized(gradient):
    """Return five Newton-Schulz steps of arXiv:2502.16982, Equation 2, on one matrix in float64."""
    x = np.asarray(gradient, np.float64)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (np.linalg.norm(wide) + 1e-8)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def first_step(config, params, seed=0):
    """Return random gradients of the parameters, and the first step of the optimizer."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = make_optimizer(config, 10)
    return grads, jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


TREES = {
    "dense": lambda: random_params(tiny_model(attention_bias=True)),
    "experts": lambda: random_params(tiny_model(moe=EXPERTS)),
    "adapters": lambda: LoraConfig(rank=2).init(jax.random.key(0), tiny_model().shapes()),
}


@pytest.mark.parametrize("tree", TREES)
def test_muon_orthogonalizes_each_matrix_of_the_layers_and_leaves_the_rest_to_adamw(tree):
    params = TREES[tree]()
    both = {"clip_norm": None, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9}
    muon = OptimConfig(optimizer="muon", learning_rate=1e-2, adam_learning_rate=1e-3, **both)
    grads, steps = first_step(muon, params)
    adam = first_step(OptimConfig(learning_rate=1e-3, **both), params)[1]
    leaves = jax.tree.leaves_with_path(steps)
    moved = set()
    for (path, step), grad, start, plain in zip(
        leaves, *map(jax.tree.leaves, (grads, params, adam)), strict=True
    ):
        names = [key.key for key in path]
        if names[0] != "layers" or names[-1] in ("scale", "bias") or "gate" in names:
            np.testing.assert_allclose(step, plain, rtol=1e-5, atol=1e-9)
            continue
        moved.add(names[-2] if names[-1] in ("kernel", "a", "b") else names[-1])
        rows, columns = grad.shape[-2:]
        each = np.asarray(grad).reshape(-1, rows, columns)
        direction = np.stack([orthogonalized(x) for x in each]).reshape(grad.shape)
        expected = -1e-2 * (0.2 * max(rows, columns) ** 0.5 * direction + 0.1 * np.asarray(start))
        # Newton-Schulz multiplies small singular values, and their rounding, by 3.4 a step.
        np.testing.assert_allclose(step, expected, atol=2e-4 * np.abs(expected).max())
    assert moved == set(TARGETS)


def test_muons_other_parameters_learn_at_its_rate_unless_told_otherwise():
    params = random_params(tiny_model())
    shared = first_step(OptimConfig(optimizer="muon", learning_rate=1e-3), params)[1]
    named = OptimConfig(optimizer="muon", learning_rate=1e-3, adam_learning_rate=1e-3)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, shared, first_step(named, params)[1]))
