"""The mixture of experts: equal to a loop over tokens, and independent of other tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fireopd_jax.models.architecture import MoEConfig
from tests.cases import random_params, response_stats, tiny_model

EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12}


def model(norm=True, layers=1):
    return tiny_model(
        num_hidden_layers=layers, moe=MoEConfig(norm_topk_prob=norm, **EXPERTS), qk_norm=True
    )


def block(norm=True):
    params = random_params(model(norm))
    layer = model(norm).bind_decode(model(norm).to_decode_layout(params))[1][0].mlp
    return layer, jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["layers"])[
        "mlp"
    ]


def plain(params, x, norm):
    out = np.zeros_like(x)
    for n, row in enumerate(x):
        z = row @ params["gate"]["kernel"]
        p = np.exp(z - z.max())
        p = p / p.sum()
        chosen = np.argsort(-p, kind="stable")[:3]
        total = p[chosen].sum() if norm else 1.0
        for e in chosen:
            experts = {name: kernel[e] for name, kernel in params["experts"].items()}
            gate = row @ experts["gate_proj"]
            inner = gate / (1 + np.exp(-gate)) * (row @ experts["up_proj"])
            out[n] += p[e] / total * (inner @ experts["down_proj"])
    return out


def rows(skewed, count=24):
    x = np.random.default_rng(3).standard_normal((count, 16))
    # All tokens are alike, so that some experts get all tokens and others none.
    return x[:1] + 0.01 * x if skewed else x


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("skewed", [True, False])
def test_experts_equal_a_loop_over_tokens(norm, skewed):
    layer, params = block(norm)
    x = rows(skewed)
    got = jax.jit(lambda x: layer(x))(x.astype(np.float32).reshape(2, 12, 16))
    np.testing.assert_allclose(
        np.reshape(got, (24, 16)), plain(params, x, norm), rtol=2e-5, atol=2e-5
    )
    counts = np.bincount(
        np.argsort(-(x @ params["gate"]["kernel"]), axis=1)[:, :3].ravel(), minlength=7
    )
    assert (counts.min() == 0) == skewed, counts


def test_a_token_is_computed_alike_among_any_others():
    layer, _ = block()
    x = rows(False).astype(np.float32)
    run = jax.jit(lambda x: layer(x))
    whole = run(x[None])
    other = np.concatenate([x[:5], 1e3 * x[5:]])
    np.testing.assert_allclose(run(other[None])[0, :5], whole[0, :5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(x[None, :5]), whole[:, :5], rtol=1e-5, atol=1e-6)


def test_devices_change_nothing():
    layer, _ = block()
    x = rows(False).astype(np.float32).reshape(8, 3, 16)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda x: layer(x))
    np.testing.assert_allclose(run(placed), run(x), rtol=1e-5, atol=1e-6)


def test_gradients_of_experts_equal_finite_differences():
    one = model(layers=2)
    params = random_params(one)
    prompt = np.array([[1, 2, 3]], np.int32)
    tokens = np.array([[4, 5, 6]], np.int32)

    @jax.jit
    def loss(params):
        length, mask = np.array([3], np.int32), np.ones((1, 3), bool)
        stats = response_stats(one, params, prompt, length, tokens, mask)
        return stats.logprob.sum()

    gradient = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    step = 1e-3
    ends = [
        float(loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)))
        for s in (step, -step)
    ]
    slope = sum(
        jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction))
    )
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 0.02 * abs(slope) + 1e-3
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert np.abs(gradient["layers"]["mlp"]["experts"][name]).max(axis=(1, 2, 3)).min() > 0


def test_more_experts_a_token_than_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts_per_tok=9 is more than num_experts=8"):
        MoEConfig(num_experts_per_tok=9)
