"""The mesh: its axes, its two shardings, micro-batches by stride, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.sharding.mesh import (
    AXES,
    MeshConfig,
    join_micro_batches,
    make_mesh,
    micro_batches,
    replicate,
    shard_rows,
)


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({}, (8, 1, 1)),
        ({"tensor": 2}, (4, 1, 2)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 3}, (3, 1, 1)),
        ({"data": 2, "tensor": 3}, (2, 1, 3)),
    ],
)
def test_the_axes_have_the_sizes_asked_for(settings, shape):
    mesh = make_mesh(MeshConfig(**settings))
    assert tuple(mesh.shape[axis] for axis in AXES) == shape


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tensor": 3}, "mesh.tensor=3"),
        ({"fsdp": 3}, "mesh.fsdp=3: does not divide the 8 devices"),
        ({"fsdp": 3, "tensor": 2}, "mesh.fsdp=3 x mesh.tensor=2: does not divide"),
        ({"data": 2, "fsdp": 8}, "mesh.data x mesh.fsdp: 16 devices"),
        ({"data": 9}, "mesh.data: 9 devices"),
        ({"data": 4, "tensor": 4}, "mesh.data x mesh.tensor: 16 devices"),
    ],
)
def test_devices_that_are_not_there_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        make_mesh(MeshConfig(**settings))


def test_rows_lie_over_all_axes_and_parameters_on_every_device():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    rows, params = shard_rows(mesh, np.zeros((16, 3))), replicate(mesh, np.zeros((16, 3)))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
    assert {shard.data.shape for shard in params.addressable_shards} == {(16, 3)}


def test_micro_batches_take_rows_by_stride_and_join_to_the_same():
    x = {"a": jnp.arange(12).reshape(6, 2), "b": jnp.arange(6)}
    parts = micro_batches(x, 3)
    np.testing.assert_array_equal(parts["b"], [[0, 3], [1, 4], [2, 5]])
    for name, value in join_micro_batches(parts).items():
        np.testing.assert_array_equal(value, x[name])


def test_each_device_keeps_its_own_rows_in_every_micro_batch():
    mesh = make_mesh(MeshConfig())
    text = jax.jit(lambda x: micro_batches(x, 2) + 1).lower(
        shard_rows(mesh, np.zeros((16, 3), np.float32))
    )
    assert "all-gather" not in text.compile().as_text()
