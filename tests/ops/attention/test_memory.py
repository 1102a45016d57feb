"""Scratch memory of attention's gradient, what its program holds, and how rows are partitioned."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.ops.attention import attention

MIB = 2**20


def gradient(length, heads=8, rows=1, sharding=None, on=None, **options):
    """Return the compiled gradient of attention among `length` tokens; `on` a mesh, row by row."""
    attend = functools.partial(attention, local=on is not None, **options)
    if on is not None:
        spec = PartitionSpec(on.axis_names)
        attend = jax.shard_map(attend, mesh=on, in_specs=spec, out_specs=spec, check_vma=False)

    def loss(q, k, v, segments):
        out = attend(q, k, v, segments)
        return (out.astype(jnp.float32) ** 2).sum()

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    keys = array(rows, heads // 2, length, 16)
    arrays = (array(rows, length, heads, 16), keys, keys, array(rows, length, dtype=jnp.int32))
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()


def test_no_array_of_length_squared_is_in_the_compiled_gradient():
    def squares(name):
        shapes = re.findall(r"\[([\d,]+)\]", gradient(1024, implementation=name).as_text())
        return [s for s in shapes if s.split(",").count("1024") > 1]

    assert squares("reference") and not squares(None)


def test_scratch_is_linear_in_the_length():
    short, long = (gradient(n).memory_analysis().temp_size_in_bytes for n in (2048, 4096))
    assert long <= 2.1 * short
    plain = gradient(2048, implementation="reference").memory_analysis().temp_size_in_bytes
    assert short < 0.1 * plain


@pytest.mark.parametrize("given", [False, True])
def test_rows_are_partitioned_without_moving_keys(given):
    axes = (AxisType.Auto,) * 2
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"), axis_types=axes)
    rows = NamedSharding(mesh, PartitionSpec(("data", "tensor")))
    text = gradient(512, rows=8, sharding=rows, on=mesh if given else None).as_text()
    moved = re.findall(r"\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective|all-reduce)", text)
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in moved]
    # Where the rows are not local, the bounds of the loops are the union over all devices.
    assert (not sizes) if given else all(size <= 16 for size in sizes), moved


@functools.cache
def toy(length, remat="full"):
    """Return the scratch of a decoder's gradient: 2 layers, 8 heads, width 256."""
    config = DecoderConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
    )
    model = LanguageModel(config, 256)

    def loss(params, tokens):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        ones = jnp.ones((1, length), jnp.int32)
        return (model.bind(params)(tokens, positions, ones, remat=remat) ** 2).sum()

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(shapes, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.slow
def test_a_decoder_of_long_rows_fits():
    assert toy(8192) < 400
    assert toy(16384) <= 2.1 * toy(8192)
    assert toy(32768) <= 2.1 * toy(16384)


@pytest.mark.slow
def test_no_policy_saves_scores():
    # One array of scores would be 8 heads x 8192^2 x 4 bytes = 2 GiB.
    assert toy(8192, "dots") < 500 and toy(8192, "none") < 1000
