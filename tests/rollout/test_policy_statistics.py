"""The policy's statistics: NumPy in float64, shards, an engine, and a forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fireopd_jax.method.filtering import TeacherQuantile
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.reweighting import ConfidenceConfusion
from fireopd_jax.method.scoring import SampledToken
from fireopd_jax.metrics import results
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.requests import Budget, Knobs, Request
from fireopd_jax.rollout.sampling import Sampling, draw, row_keys
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.training.update import FAR, gradients
from tests.cases import (
    assembled,
    make_prompts,
    random_params,
    response_stats,
    scored,
    tiny_model,
)
from tests.rollout.filters import distribution

VOCABULARY, PADDED, STOP = 480, 512, (3, 7, 50)
CASES = [
    {"temperature": temperature} | more
    for temperature in (0.0, 0.7, 1.0, 1.3)
    for more in ({}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"min_tokens": 9})
]
ROWS, WIDTH, ROOM = 6, 5, 7
LENGTHS = (5, 1, 3, 4, 2, 5)
GEMMA = {
    "num_hidden_layers": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_types": ("sliding_attention", "full_attention"),
    "sliding_window": 4,
    "rope_local_theta": 100.0,
    "zero_centered_norms": True,
    "post_norms": True,
    "scale_embeddings": True,
    "final_logit_softcapping": 5.0,
}
MODELS = {
    "qwen3": {"num_hidden_layers": 2},
    "llama": {"num_hidden_layers": 2, "qk_norm": False, "tie_word_embeddings": False},
    "gemma": GEMMA,
}


def logits_of(rows):
    """Return logits of a padded vocabulary, some of them almost certain of one token."""
    logits = 2 * np.random.default_rng(0).standard_normal((rows, VOCABULARY))
    logits[::4, 17] += 40
    return np.pad(logits, ((0, 0), (0, PADDED - VOCABULARY)), constant_values=-np.inf)


def one(logits, ids, sampling, axis=None):
    position = jnp.int32(1)
    return draw(logits, row_keys(sampling.seed, ids, position), sampling, position, axis)


def knobs_of(cases, **more):
    rows = [Sampling.of(STOP, 1, 0, **case, **more) for case in cases]
    return dataclasses.replace(jax.tree.map(lambda *x: jnp.stack(x), *rows), seed=jnp.uint32(0))


def sharded(logits, ids, sampling):
    mesh = jax.make_mesh((2, 4), ("data", "vocabulary"), (AxisType.Auto,) * 2)
    specs = jax.tree.map(lambda knob: P("data") if knob.ndim else P(), sampling)
    return jax.shard_map(
        lambda *x: one(*x, axis="vocabulary"),
        mesh=mesh,
        in_specs=(P("data", "vocabulary"), P("data"), specs),
        out_specs=P("data"),
    )(logits, ids, sampling)


@pytest.mark.parametrize("draw_all", [one, sharded], ids=["whole", "8 devices"])
def test_logprob_and_entropy_are_of_the_unfiltered_distribution(draw_all):
    logits = logits_of(len(CASES))
    inputs = jnp.asarray(logits, jnp.float32), jnp.arange(len(CASES), dtype=jnp.int32)
    got = jax.jit(draw_all)(*inputs, knobs_of(CASES, entropy=True))
    assert got.policy_logprob.dtype == got.policy_entropy.dtype == jnp.float32
    for i, case in enumerate(CASES):
        p = distribution(logits[i], case["temperature"] or 1.0)
        with np.errstate(divide="ignore"):
            log_p = np.log(p)
        entropy = -np.sum(np.where(p > 0, p * np.where(p > 0, log_p, 0), 0))
        np.testing.assert_allclose(got.policy_logprob[i], log_p[got.token[i]], atol=2e-5)
        np.testing.assert_allclose(got.policy_entropy[i], entropy, atol=2e-5)


def test_rows_that_do_not_ask_have_no_entropy_and_the_same_tokens():
    logits, ids = jnp.asarray(logits_of(4), jnp.float32), jnp.arange(4, dtype=jnp.int32)
    cases = CASES[6:10]
    asked = [{"entropy": i % 2 == 0} for i in range(4)]
    mixed = dataclasses.replace(
        knobs_of(cases), entropy=jnp.array([each["entropy"] for each in asked])
    )
    run = jax.jit(one)
    none, some, every = (
        run(logits, ids, knobs) for knobs in (knobs_of(cases), mixed, knobs_of(cases, entropy=True))
    )
    assert not none.policy_entropy.any() and every.policy_entropy.all()
    np.testing.assert_array_equal(some.policy_entropy[::2], every.policy_entropy[::2])
    assert not some.policy_entropy[1::2].any()
    for got in (some, every):
        np.testing.assert_array_equal(got.token, none.token)
        np.testing.assert_array_equal(got.policy_logprob, none.policy_logprob)


def rollout_of(model, params, **knobs):
    prompts = make_prompts(LENGTHS, WIDTH, vocab_size=model.size)
    sampling = Sampling.of(STOP, ROOM, 3, entropy=True, **knobs)
    return jax.jit(
        lambda params, prompts: generate(
            model, params, prompts, sampling, jnp.int32(0), max_tokens=ROOM, slots=4
        )
    )(params, prompts)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_steps_score_like_a_forward_pass(name):
    model = dataclasses.replace(tiny_model(64, **MODELS[name]), valid=60)
    params = random_params(model)
    rollout = rollout_of(model, params, temperature=0.7, top_p=0.9)
    prompts, mask = rollout.prompts, np.asarray(rollout.mask)
    wanted = jax.jit(
        lambda params: response_stats(
            model, params, prompts.tokens, prompts.length, rollout.tokens, rollout.mask, 0.7
        )
    )(params)
    assert mask.sum() > 2 * ROWS
    assert np.abs(rollout.policy.logprob - rollout.logprob)[mask].max() > 1e-3
    for name in ("logprob", "entropy"):
        got, forward = getattr(rollout.policy, name), getattr(wanted, name)
        assert np.abs(got - forward)[mask].max() < 1e-4


def test_a_step_is_that_of_a_forward_pass():
    model = tiny_model(32)
    student, teacher = random_params(model, 0), random_params(model, 1)
    rollout = rollout_of(model, student)

    @jax.jit
    def step(rollout):
        kind = "forward" if rollout.policy is None else "decode"
        scores = scored(SampledToken(student=kind), (model, student), [(model, teacher)], rollout)
        stages = TeacherQuantile(drop_fraction=0.3), ConfidenceConfusion()
        batch, keep = assembled(rollout, scores, *stages, "seq", 1)
        return keep, *gradients(model, SampledReverseKL(), student, batch, micro_batch_size=3)

    keep, gradient, metrics = step(rollout)
    wanted_keep, wanted, of_forward = step(dataclasses.replace(rollout, policy=None))
    assert 0 < keep.sum() < ROWS
    np.testing.assert_array_equal(keep, wanted_keep)
    found, known = results(jax.device_get(metrics)), results(jax.device_get(of_forward))
    np.testing.assert_allclose(found["loss"], known["loss"], rtol=1e-4, atol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * largest)
    # The gap between sampler and update is logged with the update, which has both.
    assert 0 < found["sampler/logprob_gap"] <= found["sampler/logprob_gap_max"] < 1e-4
    assert "sampler/logprob_gap" not in known and found["policy/log_ratio_max"] < 1e-4
    unasked = dataclasses.replace(rollout, policy=None)
    with pytest.raises(ValueError, match=r"needs the sampler's scores: Rollout\.policy"):
        scored(SampledToken(student="decode"), (model, student), [(model, teacher)], unasked)


def test_a_response_in_flight_keeps_its_statistics():
    model = tiny_model(32)
    engine = Engine(model, width=WIDTH, room=ROOM, seed=3, slots=2, rows=4, chunk_steps=2)
    engine.load(random_params(model))
    knobs = Knobs(temperature=0.7, top_k=20, entropy=True)
    request = Request(5, np.array([4, 9, 2], np.int32), knobs)
    (whole,) = engine.generate([request])
    (begun,) = engine.generate([request], Budget(tokens=4))
    assert 0 < len(begun.tokens) < len(whole.tokens) == ROOM
    (ended,) = engine.generate([dataclasses.replace(request, begun=begun)])
    np.testing.assert_array_equal(ended.tokens, whole.tokens)
    assert (whole.policy_entropies > 0).all()
    for name in ("policy_logprobs", "policy_entropies"):
        np.testing.assert_allclose(getattr(ended, name), getattr(whole, name), atol=1e-5)
        assert len(getattr(whole.cut(2, "stop"), name)) == 2
    (plain,) = engine.generate(
        [dataclasses.replace(request, knobs=Knobs(temperature=0.7, top_k=20))]
    )
    np.testing.assert_array_equal(plain.tokens, whole.tokens)
    np.testing.assert_array_equal(plain.policy_logprobs, whole.policy_logprobs)
    assert not plain.policy_entropies.any()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [4, 16])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_how_far_decoding_steps_are_from_the_update(layers, dtype, bound):
    """Print the figures of docs/rollout.md: `pytest -m slow -s` shows them."""
    model = tiny_model(
        8192,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        rope_theta=1e6,
        dtype=dtype,
    )
    params = jax.jit(model.init)(jax.random.key(0))
    params["embed_tokens"] = params["embed_tokens"] * 6  # logits as spread as a trained model's
    rng = np.random.default_rng(0)
    prompts = make_prompts(rng.integers(16, 33, 8), 32, vocab_size=8192)
    sampling = Sampling.of((), 96, 0, entropy=True)
    rollout = jax.jit(lambda p: generate(model, p, prompts, sampling, jnp.int32(0), max_tokens=96))(
        params
    )

    def stats(params):
        inputs = prompts.tokens, prompts.length, rollout.tokens, rollout.mask
        out = response_stats(model, params, *inputs)
        return out.logprob.sum(), out

    forward = jax.jit(lambda params: stats(params)[1])(params)
    _, update = jax.jit(jax.grad(stats, has_aux=True))(params)
    pairs = {
        "decode - forward": (rollout.policy, forward),
        "update - decode": (update, rollout.policy),
        "update - forward": (update, forward),
    }
    for name, (one, other) in pairs.items():
        gaps = [
            np.abs(getattr(one, field) - getattr(other, field))[rollout.mask]
            for field in ("logprob", "entropy")
        ]
        far = (np.expm1(gaps[0]) > FAR).mean()
        shown = [f"{gap.mean():.1e} / {gap.max():.1e}" for gap in gaps]
        print(f"\n{dtype} {layers} {name}: log-prob {shown[0]}, entropy {shown[1]}, far {far}")
        assert gaps[0].max() < bound
