"""The choice of the head implementation, and a kernel called through the public API."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from fireopd_jax.ops import dispatch, pallas_gpu
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.dispatch import FEWEST_TOKENS, SMALLEST_VOCABULARY, default_kernels
from fireopd_jax.ops.head import head_gather, head_topk
from fireopd_jax.ops.logits import HeadSharding
from fireopd_jax.verify import reference_batch as oracle


def lowered(platform, tokens=FEWEST_TOKENS, vocabulary=SMALLEST_VOCABULARY, **options):
    shape = jax.ShapeDtypeStruct
    arrays = (
        shape((tokens, 128), jnp.bfloat16),
        shape((vocabulary, 128), jnp.bfloat16),
        shape((tokens,), jnp.int32),
    )
    program = jax.jit(lambda *arrays: head_topk(*arrays, k=8, **options))
    return program.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "options", "kernel"),
    [
        ("tpu", {}, True),
        ("cpu", {}, False),
        ("cuda", {}, False),
        ("tpu", {"tokens": FEWEST_TOKENS - 1}, False),
        ("tpu", {"vocabulary": SMALLEST_VOCABULARY - 1}, False),
        ("tpu", {"implementation": "chunked"}, False),
    ],
)
def test_the_platform_a_program_is_lowered_for_decides(platform, options, kernel):
    assert ("tpu_custom_call" in lowered(platform, **options)) == kernel


HOPPER, AMPERE, BLACKWELL = "9.0", "8.0", "10.0"


@pytest.mark.parametrize(
    ("capabilities", "tokens", "dtype", "served"),
    [
        ([HOPPER], FEWEST_TOKENS, jnp.bfloat16, True),
        ([HOPPER] * 2, FEWEST_TOKENS, jnp.bfloat16, False),
        ([AMPERE], FEWEST_TOKENS, jnp.bfloat16, False),
        ([BLACKWELL], FEWEST_TOKENS, jnp.bfloat16, False),
        ([HOPPER], FEWEST_TOKENS - 1, jnp.bfloat16, False),
        ([HOPPER], FEWEST_TOKENS, jnp.float32, False),
    ],
)
def test_one_gpu_of_one_generation_gets_its_kernel(
    capabilities, tokens, dtype, served, monkeypatch
):
    gpus = [types.SimpleNamespace(compute_capability=each) for each in capabilities]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    monkeypatch.setattr(pallas_gpu.tile, "OLDEST_JAX", (0,))
    found = default_kernels(tokens, 128, SMALLEST_VOCABULARY, 0, 8, dtype)
    assert found.get("cuda") == (pallas_gpu if served else None)


@pytest.mark.skipif(
    jax.__version_info__ < pallas_gpu.tile.OLDEST_JAX, reason="Mosaic GPU kernels need JAX 0.11"
)
@pytest.mark.parametrize(("hopper", "platform"), [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_its_kernel_is_lowered_under_gradients_loops_and_recomputation(
    hopper, platform, monkeypatch
):
    monkeypatch.setattr(dispatch, "has_one_hopper_gpu", lambda: hopper)
    shape = jax.ShapeDtypeStruct

    def loss(hidden, head, ids):
        def part(total, ids):
            return total + head_gather(hidden, head, ids, ids[:, None]).logprob.sum(), None

        return jax.lax.scan(jax.checkpoint(part), jnp.float32(0), ids)[0]

    arrays = (
        shape((FEWEST_TOKENS, 128), jnp.bfloat16),
        shape((SMALLEST_VOCABULARY, 128), jnp.bfloat16),
        shape((2, FEWEST_TOKENS), jnp.int32),
    )
    lowered = jax.jit(jax.grad(loss, (0, 1))).trace(*arrays).lower(lowering_platforms=(platform,))
    assert ("mosaic_gpu" in lowered.as_text()) == (hopper and platform == "cuda")


def test_a_named_kernel_is_not_replaced():
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU backend"):
        lowered("cpu", implementation="pallas_tpu")


def test_a_named_kernel_that_cannot_run_raises_its_reason():
    half = jnp.zeros((2, 8), jnp.float16)
    with pytest.raises(ValueError, match=r"implementation 'pallas_tpu': .*float16"):
        head_topk(half, half, jnp.zeros(2, jnp.int32), k=1, implementation="pallas_tpu")


@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 2)])
def test_a_kernel_behind_the_public_functions_equals_the_oracle(layout, data, tensor):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(6, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(300, 16)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 290, 6), jnp.int32)
    support = jnp.asarray(rng.integers(-1, 290, (6, 3)), jnp.int32)
    mesh = Mesh(
        np.array(jax.devices()[: data * tensor]).reshape(data, tensor),
        ("data", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
    )
    options = {
        "implementation": "pallas_tpu",
        "interpret": True,
        "blocks": Blocks(tokens=128, vocabulary=128),
        "valid": 290,
        "chunk": 64,
        "head_layout": layout,
        "sharding": HeadSharding(mesh, ("data",), "tensor") if data * tensor > 1 else None,
    }
    transposed = head.T if layout == "dv" else head
    found = jax.jit(lambda *arrays: head_topk(*arrays, k=5, **options))(hidden, transposed, ids)
    z = oracle.head_logits(hidden, head, valid=290)
    top_ids, top_logprob = oracle.head_topk(z, 5)
    np.testing.assert_array_equal(found.top_ids, top_ids)
    np.testing.assert_allclose(found.top_logprob, top_logprob, rtol=1e-5, atol=2e-5)
    cotangents = [jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(3)]
    cotangents.append(jnp.asarray(rng.normal(size=(6, 3)), jnp.float32))

    @jax.jit
    def outcome(hidden, head):
        stats = head_gather(hidden, head, ids, support, **options)
        inside = jnp.where(support >= 0, stats.support_logprob, 0.0)
        values = (stats.logprob, stats.entropy, stats.logsumexp, inside)
        return sum((c * value).sum() for c, value in zip(cotangents, values, strict=True))

    d_hidden, d_head = jax.grad(outcome, (0, 1))(hidden, transposed)
    d_head = d_head.T if layout == "dv" else d_head
    truth = oracle.head_gather_gradients(hidden, head, ids, support, cotangents, valid=290)
    for ours, expected in zip((d_hidden, d_head), truth, strict=True):
        assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()
