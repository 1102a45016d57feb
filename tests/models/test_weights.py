"""The one table of parameters: every family's, with axes that fit their shapes."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec
from jax.tree_util import keystr

from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.quantized import quantize_params
from fireopd_jax.models.weights import BY_PATH, TABLE, flat
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh
from fireopd_jax.sharding.rules import DECODE, spec_of
from tests.cases import random_params, tiny_model

MODELS = {
    "dense": {"attention_bias": True, "mlp_bias": True, "attention_output_bias": True},
    "tied": {"tie_word_embeddings": True, "qk_norm": True},
    "experts": {"moe": MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_row_whose_axes_are_those_of_its_array(name):
    model = tiny_model(**MODELS[name])
    c = model.config
    sizes = {
        "layers": {c.num_hidden_layers},
        "expert": {c.moe.num_experts if c.moe else 0},
        "vocab": {model.vocab_size},
        "embed": {c.hidden_size},
        "heads": {c.num_attention_heads * c.head_dim},
        "kv_heads": {c.num_key_value_heads * c.head_dim},
        "mlp": {c.intermediate_size, c.moe.moe_intermediate_size if c.moe else 0},
    }
    leaves = jax.tree.leaves_with_path(model.shapes())
    assert len({flat(path) for path, _ in leaves} & BY_PATH.keys()) == len(leaves)
    for path, leaf in leaves:
        axes = BY_PATH[flat(path)].axes
        assert len(axes) == leaf.ndim
        assert all(n in sizes[a] for a, n in zip(axes, leaf.shape, strict=True) if a), path


def test_no_row_names_an_axis_twice():
    for row in TABLE:
        named = [axis for axis in row.axes if axis is not None]
        assert len(named) == len(set(named))


def decode_specs(model, quantize=None):
    """Return the specs of a layer and of the tables on two devices that share a replica."""
    mesh = make_mesh(MeshConfig(data=1, tensor=2))
    params = random_params(model)
    params = params if quantize is None else quantize(params)
    placed = jax.jit(lambda p: model.to_decode_layout(p, mesh))(params)
    tree = {**placed["layers"][0], "embed_tokens": placed["embed_tokens"]}
    return {keystr(path, simple=True, separator="."): tuple(leaf.sharding.spec)
            for path, leaf in jax.tree.leaves_with_path(tree)}  # fmt: skip


COLUMNS, ROWS, WHOLE = (None, "tensor"), ("tensor",), ()


@pytest.mark.parametrize("shared", [1, 2])
def test_decoding_shards_heads_mlp_and_vocabulary(shared):
    model = tiny_model(num_key_value_heads=shared, **MODELS["dense"])
    specs = {name: spec for name, spec in decode_specs(model).items() if "norm" not in name}
    keys = {"kernel": COLUMNS, "bias": ROWS} if shared == 2 else {"kernel": WHOLE, "bias": WHOLE}
    columns = {"kernel": COLUMNS, "bias": ROWS}
    rows = {"kernel": ROWS, "bias": WHOLE}
    wanted = {f"self_attn.{n}_proj": keys for n in "kv"}
    wanted |= dict.fromkeys(("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"), columns)
    wanted |= dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), rows)
    flattened = {f"{n}.{leaf}": spec for n, own in wanted.items() for leaf, spec in own.items()}
    assert {n: trimmed(s) for n, s in specs.items()} == flattened | {"embed_tokens": ROWS}


def test_decoding_shards_experts_and_int8_kernels_alike():
    specs = {n: trimmed(s) for n, s in decode_specs(tiny_model(**MODELS["experts"])).items()}
    assert specs["mlp.experts.up_proj"] == (None, None, "tensor")
    assert specs["mlp.experts.down_proj"] == (None, "tensor")
    assert specs["mlp.gate.kernel"] == WHOLE
    model = dataclasses.replace(tiny_model(), quantize="int8")
    specs = {n: trimmed(s) for n, s in decode_specs(model, quantize_params).items()}
    assert specs["self_attn.q_proj.kernel.values"] == specs["self_attn.q_proj.kernel.scale"]
    assert specs["self_attn.o_proj.kernel.values"] == ROWS
    assert specs["self_attn.o_proj.kernel.scale"] == WHOLE


def trimmed(spec):
    """Return a spec without the axes at its end that are not sharded."""
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


def test_two_axes_of_one_array_on_one_axis_of_the_mesh_are_refused_by_name():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' .* mesh's axis 'tensor'"):
        spec_of(("heads", "mlp"), (4, 4), DECODE, mesh)
    assert spec_of(("heads", "mlp"), (3, 4), DECODE, mesh) == PartitionSpec(None, "tensor")
    assert spec_of(("layers", None), (4, 4), DECODE, mesh) == PartitionSpec(None, None)
