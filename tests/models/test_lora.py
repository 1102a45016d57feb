"""Adapters: no effect at first, the same as merged weights later, and the only gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.models.architecture import MoEConfig
from fireopd_jax.models.lora import TARGETS, LoraConfig
from fireopd_jax.recipe.optim import OptimConfig
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.training.optimizer import make_optimizer
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import gradients, make_update
from fireopd_jax.types import Scores, TokenStats
from tests import cases
from tests.cases import make_prompts, make_rollout, random_params, response_stats, tiny_model

ROWS, P, T = 4, 3, 5
LORA = LoraConfig(rank=2, alpha=6)
MODELS = {
    "dense": tiny_model(num_hidden_layers=2),
    "experts": tiny_model(
        num_hidden_layers=2,
        moe=MoEConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
    ),
    "windows": tiny_model(
        num_hidden_layers=2,
        sliding_window=3,
        layer_types=("sliding_attention", "full_attention"),
    ),
}


def learnt(params, lora=LORA, seed=1):
    """Return adapters whose B are not zero."""
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


def make_batch():
    rng = np.random.default_rng(0)
    mask = np.arange(T)[None] < np.array([5, 3, 4, 2])[:, None]
    stats = [
        TokenStats(*(jnp.asarray(rng.exponential(1, mask.shape) * sign, jnp.float32)
                     for sign in (-1, 1)))
        for _ in range(2)
    ]  # fmt: skip
    rollout = dataclasses.replace(
        make_rollout(mask),
        prompts=make_prompts([3, 1, 2, 3], P),
        tokens=rng.integers(0, 32, mask.shape).astype(np.int32),
    )
    return cases.assembled(rollout, Scores(*stats), KeepAll(), Uniform(), "seq", 1)[0]


BATCH = make_batch()


@functools.partial(jax.jit, static_argnums=0)
def logprobs(model, params, adapters=None):
    rollout = BATCH.rollout
    prompts = rollout.prompts.tokens, rollout.prompts.length
    return response_stats(
        model, params, *prompts, rollout.tokens, rollout.mask, adapters=adapters
    ).logprob


def test_new_adapters_change_no_bit():
    params = random_params(MODELS["dense"])
    adapters = LORA.init(jax.random.key(3), params)
    for path, leaf in jax.tree.leaves_with_path(adapters):
        assert leaf.any() == (path[-1].key == "a"), path
        assert leaf.dtype == jnp.float32
    merged = jax.jit(LORA.merge)(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    plain = logprobs(MODELS["dense"], params)
    np.testing.assert_array_equal(
        logprobs(MODELS["dense"], params, LORA.scaled(adapters))[BATCH.rollout.mask],
        plain[BATCH.rollout.mask],
    )


def test_a_merged_kernel_is_the_sum_by_hand():
    params = random_params(MODELS["dense"])
    adapters = learnt(params)
    merged = LORA.merge(params, adapters)
    for layer in range(2):
        pair = adapters["layers"]["self_attn"]["q_proj"]
        wanted = params["layers"]["self_attn"]["q_proj"]["kernel"][layer] + 3 * (
            np.asarray(pair["a"][layer], np.float64) @ np.asarray(pair["b"][layer], np.float64)
        )
        got = merged["layers"]["self_attn"]["q_proj"]["kernel"][layer]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["embed_tokens"], params["embed_tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_adapters_beside_the_model_say_what_merged_ones_say(name):
    model = MODELS[name]
    params = random_params(model)
    adapters = learnt(params)
    merged = np.asarray(logprobs(model, LORA.merge(params, adapters)))
    beside = np.asarray(logprobs(model, params, LORA.scaled(adapters)))
    mask = np.asarray(BATCH.rollout.mask)
    np.testing.assert_allclose(beside[mask], merged[mask], rtol=2e-5, atol=2e-5)
    assert np.abs(merged - logprobs(model, params))[mask].max() > 0.1


def test_merged_weights_have_the_type_of_the_base():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(MODELS["dense"]))
    merged = LORA.merge(half, learnt(half))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_the_gradient_is_that_through_merged_weights(name):
    model, loss = MODELS[name], SampledReverseKL()
    params = random_params(model)
    adapters = learnt(params)

    @jax.jit
    def ours(adapters):
        return gradients(model, loss, adapters, BATCH, lora=LORA, base=params)

    @jax.jit
    def through_merged(adapters):
        merged, back = jax.vjp(lambda adapters: LORA.merge(params, adapters), adapters)
        grads, metrics = gradients(model, loss, merged, BATCH)
        return back(grads)[0], metrics

    (grads, metrics), (wanted, same) = ours(adapters), through_merged(adapters)
    np.testing.assert_allclose(metrics["loss"].total, same["loss"].total, rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    for (path, got), want in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted), strict=True
    ):
        largest = np.abs(want).max()
        assert largest > 0, path
        assert np.abs(got - want).max() <= 2e-5 * largest, path


def test_the_gradient_is_that_of_differences():
    model = MODELS["dense"]
    params = random_params(model)
    adapters = learnt(params)
    direction = learnt(params, seed=2)

    @jax.jit
    def total(step):
        moved = jax.tree.map(lambda x, d: x + step * d, adapters, direction)
        return logprobs(model, params, LORA.scaled(moved)).sum(where=BATCH.rollout.mask)

    step = 2e-3  # Small, so that terms of third order are negligible.
    wanted = (total(step) - total(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(0.0), wanted, rtol=2e-2)


def test_the_optimizer_holds_adapters_alone_and_the_base_stays():
    model = MODELS["dense"]
    params = random_params(model)
    lora = LoraConfig(rank=2, targets=["q_proj", "down_proj"])
    adapters = lora.init(jax.random.key(0), params)
    assert set(adapters["layers"]["self_attn"]) == {"q_proj"}
    assert set(adapters["layers"]["mlp"]) == {"down_proj"}
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), 10)
    state = init_state(adapters, optimizer)
    shapes = {leaf.shape for leaf in jax.tree.leaves(adapters)} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state)} <= shapes
    update = make_update(model, SampledReverseKL(), optimizer, lora=lora, micro_batch_size=2)
    after, metrics = jax.jit(update)(state, BATCH, jnp.float32(1), params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["skipped"].total == 0
    # A has no gradient while B is zero; only weight decay moves it.
    for path, leaf in jax.tree.leaves_with_path(after.params):
        assert path[-1].key == "a" or np.abs(leaf).max() > 1e-3, path


def test_every_linear_map_has_a_name_and_each_expert_its_own():
    params = jax.eval_shape(MODELS["dense"].init, jax.random.key(0))
    adapters = jax.eval_shape(LORA.init, jax.random.key(0), params)["layers"]
    assert {*adapters["self_attn"], *adapters["mlp"]} == set(TARGETS)
    params = jax.eval_shape(MODELS["experts"].init, jax.random.key(0))
    adapters = jax.eval_shape(LORA.init, jax.random.key(0), params)["layers"]
    assert set(adapters["mlp"]) == {"experts"}
    pair = adapters["mlp"]["experts"]["down_proj"]
    assert (pair["a"].shape, pair["b"].shape) == ((2, 3, 8, 2), (2, 3, 2, 16))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student.lora.targets=[q_porj]", "unknown linear map 'q_porj' .did you mean 'q_proj'"),
        ("student.lora.targets=q_proj", "expected a list of linear maps; known are q_proj, k_proj"),
        ("student.lora.targets=[]", "expected a list"),
        ("student.lora.rank=0", "student.lora.rank: .*greater than 0"),
        ("teacher.lora.rank=2", "unknown key 'teachers.default.lora"),
    ],
)
def test_mistakes_are_one_line(setting, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(["teacher={}", setting])
    assert "\n" not in str(caught.value)


def test_a_setting_turns_them_on_and_null_off():
    config = load_config(["teacher={}", "student.lora.targets=[q_proj]"])
    assert config.student.lora == LoraConfig(targets=["q_proj"])
    assert config.student.lora.adapts("q_proj") and not config.student.lora.adapts("k_proj")
    assert load_config(["teacher={}", "student.lora={}"]).student.lora == LoraConfig()
    assert load_config(["teacher={}"]).student.lora is None
