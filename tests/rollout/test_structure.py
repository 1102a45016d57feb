"""The compiled loop has no copies of the cache, no sorts, no communication between replicas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.models.layers import TransposedKernel
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate
from tests.cases import random_params, tiny_model

VOCABULARY = 5000
MODEL = tiny_model(VOCABULARY, num_hidden_layers=2)


def compiled(model=MODEL, params=None, **settings):
    settings = {"width": 24, "room": 176, "seed": 0, "slots": 5, "rows": 9} | settings
    made = Engine(model, **settings)
    made.load(random_params(model) if params is None else params)
    (program,) = made._runs.values()
    return made, program


def sizes(text, operation):
    """Return the element counts of all results of an operation."""
    shapes = re.findall(rf"= \(?\w+\[([0-9,]*)\][^=]*? {operation}\(", text)
    return [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes]


@pytest.mark.parametrize("memory", [Dense(), Paged(page_size=8)], ids=["dense", "paged"])
def test_the_cache_is_updated_in_place(memory):
    # Large enough that XLA does not prefer a copy to an alias.
    wide = tiny_model(
        VOCABULARY,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    made, program = compiled(wide, width=64, room=256, slots=16, rows=64, memory=memory)
    text = program.as_text()
    cache = jax.tree.leaves(made._state.cache)
    buffers = {leaf.size for leaf in cache if leaf.ndim > 3}
    copies = set(sizes(text, "copy"))
    assert copies and not copies & buffers, copies & buffers
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= sum(leaf.nbytes for leaf in cache)


def test_a_cpu_has_weights_on_the_left_of_a_step():
    made, program = compiled()
    config, slots = MODEL.config, made.shape.slots
    assert isinstance(made._params["layers"][0]["mlp"]["up_proj"]["kernel"], TransposedKernel)
    found = set(re.findall(r"= f32\[(\d+,\d+)\]\S* dot\(", program.as_text()))
    for columns in (config.intermediate_size, config.hidden_size, VOCABULARY):
        assert f"{columns},{slots}" in found and f"{slots},{columns}" not in found, found


def test_nothing_of_the_vocabulary_is_sorted():
    _, program = compiled()
    assert max(sizes(program.as_text(), "sort"), default=0) < VOCABULARY
    found = sizes("%s = (f32[2,5000]{1,0}, s32[2,5000]{1,0}) sort(%a, %b)", "sort")
    assert found == [10000]  # The pattern would find a sort.


def test_replicas_do_not_wait_for_one_another():
    mesh = make_mesh(MeshConfig(data=4))
    params = replicate(mesh, random_params(MODEL))
    _, program = compiled(MODEL, params, mesh=mesh)
    text = program.as_text()
    for operation in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
        assert f" {operation}" not in text and f"{operation}-start" not in text


def test_an_unfinished_state_may_not_be_used_twice():
    made, _ = compiled()
    state = made._state
    made._state = made._runs[made.capacity](made._params, state, jnp.int32(1), made.version)
    with pytest.raises((RuntimeError, ValueError), match=r"delet|donat"):
        np.asarray(state.slots.position)
