"""Parameters in bfloat16: a float32 copy keeps updates that rounding would lose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import gradients, make_update
from tests.cases import random_params, tiny_model
from tests.models.test_lora import BATCH

HALF = jnp.dtype(jnp.bfloat16)
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
