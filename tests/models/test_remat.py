"""Rematerialisation: the same gradient with less memory."""

import functools

import jax
import numpy as np
import pytest

from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.lora import LoraConfig
from tests.cases import make_prompts, random_params, response_stats, tiny_model

LORA = LoraConfig(rank=2)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 6)).astype(np.int32)
SHAPES = {
    "one kind": {},
    "two kinds": {
        "sliding_window": 3,
        "layer_types": ("sliding_attention", "full_attention", "full_attention"),
    },
    "experts": {"moe": MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)},
}


def loss(model, tokens, remat, params, adapters=None):
    prompts = make_prompts([3] * len(tokens), 3)
    mask = np.ones(tokens.shape, bool)
    stats = response_stats(
        model, params, prompts.tokens, prompts.length, tokens, mask, adapters=adapters, remat=remat
    )
    return stats.logprob.sum() + stats.entropy.sum()


def hidden(model, tokens, remat, params):
    ones = np.ones_like(tokens)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None] * ones
    return (model.bind(params)(tokens, places, ones, remat=remat) ** 2).sum()


def assert_close(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_policy_gives_the_same_loss_and_gradient(shape):
    model = tiny_model(num_hidden_layers=3, **SHAPES[shape])
    params = random_params(model)

    def of(remat):
        return jax.jit(jax.value_and_grad(functools.partial(loss, model, TOKENS, remat)))(params)

    wanted = of("none")
    for remat in ("full", "dots"):
        assert_close(of(remat), wanted)


def held(remat, with_adapters=False):
    """Return the temporary memory of the compiled gradient, in bytes."""
    model = tiny_model(num_hidden_layers=12, hidden_size=32, intermediate_size=96)
    params = random_params(model)
    tokens = np.zeros((8, 32), np.int32)
    if with_adapters:
        adapters = LORA.init(jax.random.key(0), params)
        tokens = tokens[:1, :2]

        def of(adapters):
            return loss(model, tokens, remat, params, LORA.scaled(adapters))

        compiled = jax.jit(jax.grad(of)).lower(adapters).compile()
    else:
        of = functools.partial(loss, model, tokens, remat)
        compiled = jax.jit(jax.grad(of)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_deep_model_holds_less():
    none, dots, full = held("none"), held("dots"), held("full")
    assert full < 0.5 * none, (full, none)
    assert full < dots < 0.8 * none, (full, dots, none)


@pytest.mark.parametrize("moe", [None, SHAPES["experts"]["moe"]])
def test_dots_computes_no_product_and_no_attention_again(moe):
    model = tiny_model(num_hidden_layers=1, intermediate_size=48, moe=moe)
    params, tokens = random_params(model), np.zeros((1, 300), np.int32)  # attention by blocks

    def flops(remat):
        of = functools.partial(hidden, model, tokens, remat)
        compiled = jax.jit(jax.grad(of)).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    none, dots, full = flops("none"), flops("dots"), flops("full")
    assert dots < 1.05 * none, (none, dots, full)
    assert full > 1.15 * none, (none, dots, full)


def test_with_adapters_no_policy_but_none_holds_a_second_model():
    none, dots, full = (held(remat, True) for remat in ("none", "dots", "full"))
    # Twelve layers of 12 to 13 thousand parameters, in float32.
    model = 12 * 12_000 * 4
    assert dots < none - 0.8 * model, (dots, none, model)
    assert full < none - 0.8 * model, (full, none, model)
