"""Parameters that are sharded while they learn: the same numbers, a part of the bytes.

Whole runs on eight virtual devices are slow.
"""

import dataclasses
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.models.lora import LoraConfig
from fireopd_jax.models.placement import Placement
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.ops.head import head_stats
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.session.parameters import abstract_params, placed
from fireopd_jax.sharding.mesh import MeshConfig, by_rows, make_mesh, replicated, shard_rows
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.run import train
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import gradients, make_update
from tests.cases import make_prompts, random_params, tiny_model
from tests.models.test_lora import BATCH, LORA, learnt
from tests.sharding.meshes import EXPERTS, MESHES, MODEL, MODELS, assert_close


def bytes_of(tree):
    """Return the bytes of a tree on its fullest device, and in all."""
    devices = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            devices[shard.device] = devices.get(shard.device, 0) + shard.data.nbytes
    return max(devices.values()), sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("mesh", "parts", "optimizer", "dtype"),
    [
        ("fsdp", 8, "adamw", "bfloat16"),
        ("fsdp", 8, "muon", "float32"),
        ("all", 4, "adamw", "float32"),
        ("all", 4, "muon", "bfloat16"),
        ("tensor", 4, "adamw", "bfloat16"),
    ],
)
def test_each_device_holds_its_part_of_parameters_and_optimizer_state(
    mesh, parts, optimizer, dtype
):
    mesh = make_mesh(MeshConfig(**MESHES[mesh]))
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
        assert most == (whole - norms) / parts + norms


def specs_of(tree, mesh):
    """Return the specs of a layer's attention, by path, without the axis of the layers."""
    places = Placement(make_mesh(MeshConfig(**MESHES[mesh]))).of(tree)["layers"]["self_attn"]
    leaves = jax.tree.leaves_with_path(places)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.spec)[1:]
            for path, leaf in leaves}  # fmt: skip


def test_int8_kernels_and_adapters_are_sharded_like_kernels():
    shapes = tiny_model(hidden_size=16).shapes()
    eight = jax.eval_shape(quantize_params, shapes)
    adapters = jax.eval_shape(lambda: LoraConfig(rank=2).init(jax.random.key(0), shapes))
    q, o = "q_proj.kernel", "o_proj.kernel"
    specs = specs_of(shapes, "fsdp")
    assert (specs[q], specs[o]) == (("fsdp", None), (None, "fsdp"))
    specs = specs_of(eight, "fsdp")
    assert (specs[f"{q}.values"], specs[f"{q}.scale"]) == (("fsdp", None), (None, None))
    assert (specs[f"{o}.values"], specs[f"{o}.scale"]) == ((None, "fsdp"), (None, "fsdp"))
    specs = specs_of(eight, "all")
    assert (specs[f"{q}.values"], specs[f"{q}.scale"]) == (("fsdp", "tensor"), (None, "tensor"))
    assert (specs[f"{o}.values"], specs[f"{o}.scale"]) == (("tensor", "fsdp"), (None, "fsdp"))
    specs, both = specs_of(adapters, "all"), ("fsdp", "tensor")
    assert (specs["q_proj.a"], specs["q_proj.b"]) == ((both, None), (None, "tensor"))
    assert (specs["o_proj.a"], specs["o_proj.b"]) == (("tensor", None), (None, both))


def test_a_table_that_the_devices_do_not_divide_lies_along_the_hidden_size():
    place = Placement(make_mesh(MeshConfig(**MESHES["all"])))
    wide = ("fsdp", "tensor")
    for rows, width, spec in ((32, 16, ("tensor", "fsdp")), (31, 16, (None, wide)), (31, 17, ())):
        table = place.of(tiny_model(rows, hidden_size=width).shapes())["embed_tokens"]
        assert tuple(axis for axis in table.spec if spec or axis) == spec


SLOW = pytest.mark.slow
PADDED, SPLIT, PACKED = {}, {"micro_batch_size": 16}, {"micro_batch_tokens": 16}


@pytest.mark.parametrize(
    ("mesh", "name", "passes"),
    [
        ("all", "dense", PACKED),
        ("tensor", "dense", PACKED),
        ("tensor", "odd", PACKED),
        pytest.param("tensor", "experts", PACKED, marks=SLOW),
        pytest.param("all", "odd", PADDED, marks=SLOW),
        pytest.param("all", "experts", SPLIT, marks=SLOW),
        pytest.param("tensor", "windows", PACKED, marks=SLOW),
        *(
            pytest.param(mesh, "dense", passes, marks=SLOW)
            for mesh in ("fsdp", "data", "all")
            for passes in (PADDED, SPLIT, PACKED)
            if (mesh, passes) != ("all", PACKED)
        ),
    ],
)
def test_gradients_are_those_of_one_device(mesh, name, passes):
    model, loss = MODELS[name], SampledReverseKL()
    params = random_params(model)
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 8), BATCH)
    last = model.vocab_size - 1
    given = jnp.minimum(rows.rollout.tokens, last)
    rows = dataclasses.replace(rows, rollout=dataclasses.replace(rows.rollout, tokens=given))
    wanted, _ = jax.jit(lambda p, b: gradients(model, loss, p, b, **passes))(params, rows)
    on = make_mesh(MeshConfig(**MESHES[mesh]))
    places = Placement(on).of(params)
    found, _ = jax.jit(
        lambda p, b: gradients(model, loss, p, b, mesh=on, **passes), out_shardings=(places, None)
    )(jax.device_put(params, places), shard_rows(on, rows))
    assert_close(found, wanted, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "experts"])
@pytest.mark.parametrize("mesh", ["all", "tensor"])
def test_gradients_of_adapters_are_those_of_one_device(mesh, name):
    model, loss, passes = MODELS[name], SampledReverseKL(), {"lora": LORA, **PACKED}
    base = random_params(model)
    adapters, rows = learnt(base), jax.tree.map(lambda x: jnp.concatenate([x] * 8), BATCH)

    def run(on):
        return jax.jit(
            lambda a, p, b: gradients(model, loss, a, b, base=p, mesh=on, **passes)[0],
            out_shardings=None if on is None else Placement(on).of(adapters),
        )

    wanted, on = run(None)(adapters, base, rows), make_mesh(MeshConfig(**MESHES[mesh]))
    trees = (jax.device_put(x, Placement(on).of(x)) for x in (adapters, base))
    assert_close(run(on)(*trees, shard_rows(on, rows)), wanted, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_int8_kernels_and_recomputation_give_the_states_of_one_device(remat):
    model = MODELS["dense"]
    params = quantize_params(random_params(model))
    tokens = jnp.arange(8 * 6, dtype=jnp.int32).reshape(8, 6) % 32
    places = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), tokens.shape)
    inputs = tokens, places, jnp.ones_like(tokens)
    on = make_mesh(MeshConfig(**MESHES["all"]))
    wanted = jax.jit(model.hidden)(params, *inputs)
    given = jax.device_put(params, Placement(on).of(params)), *shard_rows(on, inputs)
    found = jax.jit(lambda *x: model.hidden(*x, mesh=on, remat=remat))(*given)
    assert_close(found, wanted, 1e-5)


def compiled_update(mesh):
    """Return the compiled update of a model of four layers, as text."""
    four = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = tiny_model(num_hidden_layers=4, hidden_size=64, intermediate_size=128, **four)
    on, rule = make_mesh(MeshConfig(**MESHES[mesh])), make_optimizer(OptimConfig(), 10)
    update = make_update(model, SampledReverseKL(), rule, micro_batch_tokens=32, mesh=on)
    state = jax.eval_shape(lambda key: init_state(model.init(key), rule), jax.random.key(0))
    state, places = placed(state, Placement(on)), Placement(on).of(state)
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 8), BATCH)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(places, replicated(on)))
    return jitted.lower(state, placed(rows, by_rows(on)), jnp.float32(1)).compile().as_text()


LAYER = {"q": (64, 32), "k": (64, 32), "v": (64, 32), "o": (32, 64),
         "gate": (64, 128), "up": (64, 128), "down": (128, 64)}  # fmt: skip
HELD = 32
"""Tokens of a pass on each device."""


def cut(shape, on):
    """Return a matrix's part on a device: of the hidden size, 64, over fsdp; else over tensor."""
    return tuple(n // on["fsdp"] if n == 64 else n // on["tensor"] for n in shape)


@pytest.mark.parametrize("mesh", MESHES)
def test_an_update_has_the_collectives_of_its_mesh_and_no_others_of_size(mesh):
    text = compiled_update(mesh)
    on = {"fsdp": 1, "tensor": 1} | MESHES[mesh]
    whole_over_fsdp = {"fsdp": 1, "tensor": on["tensor"]}

    def shapes_of(kind):
        found = re.findall(rf"= \w+\[([\d,]*)\]\S* {kind}\(", text)
        shapes = Counter(tuple(map(int, each.split(","))) for each in found)
        return {shape: count for shape, count in shapes.items() if np.prod(shape) > 128}

    gathered, scattered = Counter(), Counter()
    if on["fsdp"] > 1:
        for shape in LAYER.values():  # forward and backward, and one gradient
            gathered[cut(shape, whole_over_fsdp)] += 2
            scattered[cut(shape, on)] += 1
        gathered[cut((32, 64), whole_over_fsdp)] += 2  # embedding and head
        scattered[cut((32, 64), on)] += 2
    if on["tensor"] > 1:
        rows, own = (on["tensor"], HELD, 64), (1, HELD, 64)
        gathered[rows] += 2 + 2 + 2  # of attention and MLP: forward, again, of the gradient
        scattered[own] += 2 + 2
        gathered[rows] += 1 + 1  # of the gradient of embeddings, and states before the head
        scattered[own] += 1  # embeddings
        scattered[(HELD, 64)] += 1  # the gradient of the states before the head
    sized = ({s: n for s, n in each.items() if np.prod(s) > 128} for each in (gathered, scattered))
    assert (shapes_of("all-gather"), shapes_of("reduce-scatter")) == tuple(sized)
    assert not shapes_of("all-to-all") and not shapes_of("collective-permute")


def test_a_head_that_the_devices_do_not_divide_changes_hands_without_a_whole_copy():
    mesh = make_mesh(MeshConfig(**MESHES["all"]))
    model = tiny_model(3001, hidden_size=64, num_hidden_layers=1)
    params = abstract_params(model, Placement(mesh))
    inputs = placed((jnp.zeros((8, 16), jnp.int32),) * 3, by_rows(mesh))

    def outcome(params, tokens, positions, segments):
        hidden, head = model.hidden(params, tokens, positions, segments, mesh=mesh)
        assert head.shape == (3002, 64)
        return head_stats(hidden, head, tokens, **model.head_options(mesh=mesh)).entropy.sum()

    grad = jax.jit(jax.grad(outcome), out_shardings=Placement(mesh).of(params))
    text = grad.lower(params, *inputs).compile().as_text()
    assert len(re.findall(r" all-to-all\(", text)) == 2  # forward and backward
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered.count("3001,64") == 1  # the embedding


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "all", "tensor"])
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
    for name in ("fsdp", "all", "tensor"):
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
    other = ["mesh.fsdp=2", "mesh.data=1", "mesh.tensor=2"]
    found = metrics_of(tmp_path / "moved", *other, "run.steps=4")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=1e-6)
