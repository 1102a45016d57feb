"""Collectives of compiled programs are counted as often as they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.training.collectives import Traffic, traffic

TEXT = """\
HloModule jit_update

%body (p: (s32[], bf16[512,256])) -> (s32[], bf16[512,256]) {
  %f = bf16[8] fusion(%a), kind=kLoop, calls=%inner, backend_config={"x":[
}}, metadata={}
  %r = (f32[256,128]{1,0}, f32[256]{0}) all-reduce(%a, %b), to_apply=%sum
}

%inner (p: bf16[8]) -> bf16[8] {
  %g = bf16[512,256]{1,0:T(8,128)} all-gather(%p), dimensions={0}
}

%bound (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%unbound (p: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%passes (p: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%t), condition=%bound, body=%body
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%unbound, body=%passes
  %s = f32[] all-reduce(%x), to_apply=%sum
  %d = f32[1024,1024]{1,0} reduce-scatter(%y), dimensions={0}
}, execution_thread="main"
"""


def test_loops_count_as_often_as_they_run_and_small_sums_do_not():
    assert traffic(TEXT) == {
        "all-gather": Traffic(28, 28 * 512 * 256 * 2),
        "all-reduce": Traffic(28, 28 * (256 * 128 + 256) * 4),
        "reduce-scatter": Traffic(1, 4 * 2**20),
    }
    assert traffic("") == {}


def test_those_of_a_real_program():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))

    @functools.partial(jax.jit, in_shardings=cut, out_shardings=whole)
    def program(x):
        def step(carry, _):
            return jax.lax.with_sharding_constraint(jnp.tanh(carry), whole) + 1, None

        return jax.lax.scan(step, x, length=5)[0]

    found = traffic(program.lower(jnp.ones((256, 256))).compile().as_text())
    assert list(found) == ["all-gather"] and found["all-gather"].bytes % (256 * 256 * 4) == 0
