"""Compile for TPUs ahead of time, without a TPU: libtpu from PyPI holds the compiler."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fireopd_jax.ops import pallas_tpu
from fireopd_jax.ops.logits import HeadSettings

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
INSTALLED = importlib.util.find_spec("libtpu") is not None
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two workers of pytest; nobody holds a device
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@functools.cache
def device_of(generation):
    os.environ.update(ENVIRONMENT)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    return topology.devices[0]


def compile_for(generation, function, *shapes):
    """Compile for one chip of the generation."""
    mesh = Mesh(np.array([device_of(generation)]), ("chip",))
    there = NamedSharding(mesh, P())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in shapes]
    # The compiler's view of the chip comes from the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def compile_head(
    generation, tokens, width, vocabulary, dtype=jnp.bfloat16, support=0, weigh=False, **options
):
    """Compile the head's kernel."""
    config = HeadSettings(vocabulary=vocabulary, chunk=1, **options)

    def forward(hidden, head, ids, support_ids, scale, *weigh):
        arguments = (hidden, head, ids, support_ids, scale, None, config)
        return pallas_tpu.forward(*arguments, weight_inputs=weigh or None)

    array = jax.ShapeDtypeStruct
    shapes = [
        array((tokens, width), dtype),
        array((vocabulary, width), dtype),
        array((tokens,), jnp.int32),
        array((tokens, support), jnp.int32),
        array((), jnp.float32),
    ]
    if weigh:
        shapes += [array((tokens,), jnp.float32), array((), jnp.float32)]
    return compile_for(generation, forward, *shapes)
