"""Parameters that are sharded while they learn: the same numbers, a part of the bytes.

Whole runs on eight virtual devices are slow.
"""

import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.models.placement import Placement
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.session.parameters import placed
from fireopd_jax.sharding.mesh import MeshConfig, by_rows, make_mesh, replicated, shard_rows
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.run import train
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import gradients, make_update
from tests.cases import make_prompts, random_params, tiny_model
from tests.models.test_lora import BATCH

MESHES = {
    "fsdp": {"fsdp": 8},
    "data": {"data": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
MODEL = tiny_model(num_hidden_layers=2, attention_bias=True)
EXPERTS = MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)


def bytes_of(tree):
    """Return the bytes of a tree on its fullest device, and in all."""
    devices = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            devices[shard.device] = devices.get(shard.device, 0) + shard.data.nbytes
    return max(devices.values()), sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_device_holds_its_part_of_parameters_and_optimizer_state(optimizer, dtype):
    mesh = make_mesh(MeshConfig(fsdp=8))
    model = tiny_model(num_hidden_layers=2, hidden_size=64, param_dtype=dtype, moe=EXPERTS)
    params = random_params(model)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    rule = make_optimizer(OptimConfig(optimizer=optimizer), 10)
    place = Placement(mesh)

    def begin(params):
        return init_state(params, rule, averaged=True)

    state = jax.jit(begin, out_shardings=place.of(jax.eval_shape(begin, params)))(params)
    for tree in (state.params, state.opt_state, state.average):
        most, whole = bytes_of(tree)
        norms = sum(
            leaf.nbytes
            for path, leaf in jax.tree.leaves_with_path(tree)
            if "'scale'" in jax.tree_util.keystr(path) or leaf.ndim < 2
        )
        assert norms < whole / 10
        assert most == (whole - norms) / 8 + norms


def test_int8_kernels_are_sharded_like_kernels_and_adapters_are_whole():
    place = Placement(make_mesh(MeshConfig(fsdp=8)))
    shapes = tiny_model(hidden_size=16).shapes()
    attention = place.of(shapes)["layers"]["self_attn"]
    q, o = (tuple(attention[n]["kernel"].spec) for n in ("q_proj", "o_proj"))
    assert (q, o) == ((None, "fsdp", None), (None, None, "fsdp"))
    adapters = jax.eval_shape(lambda: LoraConfig(rank=2).init(jax.random.key(0), shapes))
    assert all(not any(each.spec) for each in jax.tree.leaves(place.of(adapters)))
    eight = place.of(jax.eval_shape(quantize_params, shapes))["layers"]["self_attn"]
    assert tuple(eight["q_proj"]["kernel"].values.spec) == q
    assert tuple(eight["q_proj"]["kernel"].scale.spec) == (None, None, None)
    assert tuple(eight["o_proj"]["kernel"].scale.spec) == o


@pytest.mark.slow
@pytest.mark.parametrize("passes", [{}, {"micro_batch_size": 2}, {"micro_batch_tokens": 16}])
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_are_those_of_one_device(mesh, passes):
    params, loss = random_params(MODEL), SampledReverseKL()
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 8), BATCH)
    passes = {k: v * 8 if k == "micro_batch_size" else v for k, v in passes.items()}
    wanted, _ = jax.jit(lambda p, b: gradients(MODEL, loss, p, b, **passes))(params, rows)
    on = make_mesh(MeshConfig(**MESHES[mesh]))
    places = Placement(on).of(params)
    found, _ = jax.jit(
        lambda p, b: gradients(MODEL, loss, p, b, mesh=on, **passes), out_shardings=(places, None)
    )(jax.device_put(params, places), shard_rows(on, rows))
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= 2e-5 * np.abs(other).max(), path


def compiled_update(mesh):
    """Return the compiled update of a model of four layers, as text."""
    model = tiny_model(num_hidden_layers=4, hidden_size=64, intermediate_size=128)
    on, rule = make_mesh(MeshConfig(**MESHES[mesh])), make_optimizer(OptimConfig(), 10)
    update = make_update(model, SampledReverseKL(), rule, micro_batch_tokens=32, mesh=on)
    state = jax.eval_shape(lambda key: init_state(model.init(key), rule), jax.random.key(0))
    state, places = placed(state, Placement(on)), Placement(on).of(state)
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 8), BATCH)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(places, replicated(on)))
    return jitted.lower(state, placed(rows, by_rows(on)), jnp.float32(1)).compile().as_text()


@pytest.mark.parametrize("mesh", MESHES)
def test_an_update_gathers_each_matrix_of_a_layer_once_a_pass_and_nothing_else_of_size(mesh):
    text = compiled_update(mesh)

    def shapes_of(kind):
        found = re.findall(rf"= \w+\[([\d,]*)\]\S* {kind}\(", text)
        shapes = Counter(tuple(map(int, each.split(","))) for each in found)
        return {shape: count for shape, count in shapes.items() if np.prod(shape) > 128}

    gathered, scattered = shapes_of("all-gather"), shapes_of("reduce-scatter")
    if mesh == "data":
        assert not gathered and not scattered
        return
    # Forward and backward; of the hidden size, 64, each device holds a part.
    kernels = {(128, 64): 1, (16, 64): 1, (64, 128): 2, (64, 16): 1, (64, 8): 2}
    tables = {(32, 64): 2}  # embedding and head
    assert gathered == {shape: 2 * count for shape, count in kernels.items()} | tables
    parts = MESHES[mesh]["fsdp"]
    cut = Counter()
    for shape, count in (kernels | tables).items():
        cut[tuple(n // parts if n == 64 else n for n in shape)] += count
    assert scattered == {shape: count for shape, count in cut.items() if np.prod(shape) > 128}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "all"])
def test_rollouts_are_those_of_one_device(mesh):
    params = random_params(MODEL)
    prompts = make_prompts([3, 5, 1, 4, 2, 5, 3, 1], 5)
    sampling = Sampling.of((1,), 8, 3)

    def run(on):
        place = (lambda x: x) if on is None else lambda x: jax.device_put(x, Placement(on).of(x))
        rows = prompts if on is None else shard_rows(on, prompts)
        return jax.jit(
            lambda p, x: generate(MODEL, p, x, sampling, jnp.int32(0), max_tokens=8, mesh=on)
        )(place(params), rows)

    one, other = run(None), run(make_mesh(MeshConfig(**MESHES[mesh])))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)


ARCHITECTURE = (
    "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32}"
)
RUN = [
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=12",
    f"student.architecture={ARCHITECTURE}",
    f"teacher.architecture={ARCHITECTURE}",
    "teacher.sft={steps: 4, batch_size: 8, optim: {learning_rate: 1e-2}}",
    "optim.learning_rate=1e-3",
    "run.steps=3",
    "run.save_every=2",
    "eval.problems=8",
    "eval.samples=1",
    "eval.batch_size=8",
]


def metrics_of(folder, *settings):
    train(load_config([*RUN, *settings, f"run.dir={folder}"]))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "lora", "int8"])
def test_a_run_learns_the_same_on_any_mesh(tmp_path, kind):
    own = {
        "plain": ["optim.optimizer=muon"],
        "lora": ["student.lora={rank: 2}", "method/gkd"],
        "int8": ["teacher.quantize=int8"],
    }[kind]
    wanted = metrics_of(tmp_path / "one", "mesh.data=1", *own)
    for name in ("fsdp", "all"):
        mesh = [f"mesh.{axis}={size}" for axis, size in MESHES[name].items()]
        found = metrics_of(tmp_path / name, *mesh, *own)
        assert len(found) == len(wanted) == 3
        for one, other in zip(found, wanted, strict=True):
            assert one["perf/compilations"] == 0 or one["step"] == 1
            for key in ("loss", "grad_norm", "entropy", "method/keep_fraction"):
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-6), (key, one["step"])


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_resumes_on_another(tmp_path):
    wanted = metrics_of(tmp_path / "whole", "mesh.data=1", "run.steps=4")
    metrics_of(tmp_path / "moved", "mesh.fsdp=4", "mesh.data=2", "run.steps=2")
    found = metrics_of(tmp_path / "moved", "mesh.fsdp=2", "mesh.data=1", "run.steps=4")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=1e-6)
