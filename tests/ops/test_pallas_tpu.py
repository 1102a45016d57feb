"""The Pallas TPU kernels in JAX's interpreter, against the oracle; and lowered for a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from fireopd_jax.ops import chunked, pallas_tpu
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.logits import HeadSettings
from fireopd_jax.ops.partials import LOWEST
from fireopd_jax.verify import reference_batch as oracle

BLOCKS = Blocks(tokens=128, vocabulary=128)
TOKENS, VOCABULARY, WIDTH, K = 130, 600, 8, 16
"""Two blocks of tokens and five tiles, the last of each partly beyond the end."""

forward = jax.jit(pallas_tpu.forward, static_argnames=("settings",))


def make_settings(vocabulary=VOCABULARY, k=K, **options):
    options = {"chunk": 1, "interpret": True, "blocks": BLOCKS} | options
    return HeadSettings(vocabulary=vocabulary, k=k, **options)


def normal(tokens=TOKENS, vocabulary=VOCABULARY, width=WIDTH, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * 3 / width**0.5, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)


def whole(tokens=TOKENS, vocabulary=VOCABULARY, width=WIDTH, levels=2, seed=0):
    """Whole numbers: every product is exact, so equal logits are equal bits."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.integers(-2, 3, (tokens, width)), jnp.float32)
    head = jnp.asarray(rng.integers(-levels, levels + 1, (vocabulary, width)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)


def run(hidden, head, ids, config, support_ids=None, scale=1.0, limit=None, weight_inputs=None):
    if support_ids is None:
        support_ids = jnp.zeros((len(ids), 0), jnp.int32)
    if limit is not None:
        limit = jnp.int32(limit)
    return forward(hidden, head, ids, support_ids, jnp.float32(scale), limit, config, weight_inputs)


def finish(state):
    log_s = np.log(state.sum_exp)
    lse = state.max_logit + log_s
    return (
        state.id_logit - state.max_logit - log_s,
        log_s - state.sum_exp_logit / state.sum_exp,
        lse,
        log_s,
    )


def check(hidden, head, ids, config, support_ids=None, scale=1.0, rows=slice(None), **given):
    """Compare `rows` with the oracle, logits at a tolerance and ids exactly; return the state."""
    transposed = head.T if config.transposed else head
    state = run(hidden, transposed, ids, config, support_ids, scale, **given)
    support_ids = np.zeros((len(ids), 0), int) if support_ids is None else support_ids
    columns = given.get("limit", config.vocabulary)
    z = oracle.head_logits(hidden[rows], head, scale, config.softcap, columns)
    known = np.asarray(ids)[rows] if columns == config.vocabulary else np.zeros(len(z), int)
    *truth, support = oracle.head_gather(z, known, np.asarray(support_ids)[rows])
    top_ids, top_logprob = oracle.head_topk(z, config.k)
    logprob, entropy, lse, log_s = finish(state)
    if columns != config.vocabulary:
        logprob, truth[0] = (
            state.id_logit,
            np.where(np.asarray(ids) < columns, state.id_logit, -np.inf),
        )
    assert (state.id_logit <= state.max_logit)[rows].all()
    offset = (state.max_logit + log_s)[:, None]
    for name, ours, expected in (
        ("logprob", logprob, truth[0]),
        ("entropy", entropy, truth[1]),
        ("logsumexp", lse, truth[2]),
        ("support", state.support_logits - offset, support),
        ("top_logits", state.top_logits - offset, top_logprob),
    ):
        tolerance = 2e-5 * max(1.0, float(np.abs(z).max(initial=0.0)) / 10)
        np.testing.assert_allclose(ours[rows], expected, tolerance, tolerance, err_msg=name)
    np.testing.assert_array_equal(state.top_ids[rows], top_ids)
    return state


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "k"),
    [
        (5, 37, 4),
        (0, 37, 4),
        (1, 300, 1),
        (3, 20, 20),
        (3, 20, 40),
        (130, 1003, 128),
        (200, 777, 0),
    ],
)
def test_equals_oracle(tokens, vocabulary, k):
    check(*normal(tokens, vocabulary), make_settings(vocabulary, k), scale=1 / 0.7)


@pytest.mark.parametrize(
    ("tokens", "support", "k"), [(130, 5, 0), (0, 5, 0), (1, 1, 0), (5, 127, 0), (5, 2, 4)]
)
def test_support_equals_oracle(tokens, support, k):
    hidden, head, ids = normal(tokens, 777)
    rng = np.random.default_rng(1)
    support_ids = rng.integers(-1, 780, (tokens, support))
    support_ids[:, -1] = ids  # a duplicate where another equals it, and of the id itself
    support_ids = jnp.asarray(support_ids, jnp.int32)
    state = check(hidden, head, ids, make_settings(777, k), support_ids, scale=1 / 0.7)
    np.testing.assert_array_equal(state.support_logits[:, -1], state.id_logit)


@pytest.mark.parametrize("support", [0, 2])
def test_ids_outside_have_no_logit(support):
    hidden, head, ids = normal(4, 200)
    ids = ids.at[:3].set(jnp.asarray([-1, 200, 2**30]))
    state = run(hidden, head, ids, make_settings(200, 0), jnp.full((4, support), -1, jnp.int32))
    assert np.isneginf(state.id_logit[:3]).all() and np.isfinite(state.id_logit[3])
    assert np.isneginf(state.support_logits).all()


@pytest.mark.parametrize(
    ("dtypes", "options"),
    [
        ((jnp.bfloat16, jnp.bfloat16), {}),
        ((jnp.float32, jnp.bfloat16), {"softcap": 6.0}),
        ((jnp.float32, jnp.float32), {"transposed": True}),
    ],
)
@pytest.mark.parametrize("support", [0, 2])
def test_options_equal_oracle(dtypes, options, support):
    hidden, head, ids = normal(20, 300, width=384)
    hidden, head = hidden.astype(dtypes[0]), head.astype(dtypes[1])
    config = make_settings(290, 0 if support else 5, blocks=Blocks(128, 128, 128), **options)
    support_ids = jnp.stack([ids % 290] * support, axis=1) if support else None
    # What pads the head is never looked at.
    head = head.at[290:].set(jnp.nan)
    check(hidden, head, ids % 290, config, support_ids, scale=1 / 0.7)


@pytest.mark.parametrize("support", [0, 2])
@pytest.mark.parametrize("limit", [0, 1, 100, 128, 599, 600])
def test_limit_equals_oracle(limit, support):
    hidden, head, ids = normal()
    support_ids = jnp.stack([ids, 0 * ids], axis=1)[:, :support]
    config = make_settings(k=0 if support else K)
    if limit:
        check(hidden, head.at[limit:].set(jnp.nan), ids, config, support_ids, limit=limit)
        return
    state = run(hidden, head, ids, config, support_ids, limit=0)
    np.testing.assert_array_equal(state.max_logit, np.float32(LOWEST))
    for nothing in (state.sum_exp, state.sum_exp_logit):
        np.testing.assert_array_equal(nothing, 0.0)
    for impossible in (state.id_logit, state.support_logits, state.top_logits):
        np.testing.assert_array_equal(impossible, -np.inf)
    np.testing.assert_array_equal(state.top_ids, -1)


@pytest.mark.parametrize("k", [K, 40])
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_equal_logits_come_lowest_id_first(levels, k):
    check(*whole(levels=levels), make_settings(k=k))


@pytest.mark.parametrize("k", [K, 40])
@pytest.mark.parametrize("last", [128, 600])
def test_a_block_of_equals_larger_than_the_list(last, k):
    """The top-K ends within ties of one tile, which share bins, and of several tiles."""
    hidden, head, ids = whole()
    hidden = jnp.abs(hidden).at[:, 0].set(1)
    for seed in range(3):
        equals = np.random.default_rng(seed).choice(last, 100, replace=False)
        check(hidden, (head - 2).at[equals].set(1), ids, make_settings(k=k))


@pytest.mark.parametrize("k", [K, 40])
def test_all_columns_equal_but_one(k):
    hidden, head, ids = whole()
    check(
        hidden, jnp.broadcast_to(head[:1], head.shape).at[500].set(head[1]), ids, make_settings(k=k)
    )


@pytest.mark.parametrize("k", [K, 40])
def test_rising_logits(k):
    """Every tile replaces the whole top-K, with two of the K largest in many bins."""
    _, head, ids = whole(width=1)
    head = jnp.arange(VOCABULARY, dtype=jnp.float32)[:, None] / 64
    check(jnp.ones((TOKENS, 1)), head, ids, make_settings(k=k))


@pytest.mark.parametrize("spread", [1e-30, 60.0, 1e4])
def test_extreme_logits_equal_oracle(spread):
    hidden, head, ids = normal()
    if spread < 1:
        # Too small to tell apart in any product of another order: equal but for the statistics.
        state = run(hidden * spread, head, ids, make_settings())
        _, entropy, lse, _ = finish(state)
        np.testing.assert_allclose(entropy, np.log(VOCABULARY), rtol=1e-6)
        np.testing.assert_allclose(lse, np.log(VOCABULARY), rtol=1e-6)
    else:
        check(hidden * spread, head, ids, make_settings())


def test_no_id_exceeds_the_maximum_logit():
    """The id's logit is summed in another order than the kernel's, which adds three slices."""
    hidden, head, ids = normal(width=384)
    config = make_settings(k=1, blocks=Blocks(128, 128, 128))
    likeliest = run(hidden, head, ids, config).top_ids[:, 0]
    state = run(hidden, head, likeliest, config)
    assert (state.id_logit <= state.max_logit).all() and (state.id_logit < state.max_logit).any()
    np.testing.assert_allclose(state.id_logit, state.max_logit, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("support", [0, 2])
def test_a_spoilt_state_spoils_its_own_row_only(value, support):
    hidden, head, ids = normal()
    support_ids = jnp.stack([ids] * support, axis=1) if support else None
    config = make_settings(k=0 if support else K)
    good = np.delete(np.arange(TOKENS), 3)
    spoilt = hidden.at[3, 0].set(value)
    state = check(spoilt, head, ids, config, support_ids, rows=good)
    assert np.isnan([each[3] for each in finish(state)[:3]]).all()
    assert ((state.top_ids >= -1) & (state.top_ids < VOCABULARY)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("support", [0, 2])
def test_a_spoilt_head_spoils_every_row(value, support):
    hidden, head, ids = normal()
    support_ids = jnp.stack([ids] * support, axis=1) if support else None
    state = run(
        hidden, head.at[77, 0].set(value), ids, make_settings(k=0 if support else K), support_ids
    )
    assert np.isnan(finish(state)[:3]).all()
    assert ((state.top_ids >= -1) & (state.top_ids < VOCABULARY)).all()


@pytest.mark.parametrize("support", [0, 2])
def test_weight_is_the_formula(support):
    hidden, head, ids = normal()
    factor = jnp.asarray(np.random.default_rng(0).uniform(1, 2, TOKENS), jnp.float32)
    support_ids = jnp.stack([ids] * support, axis=1) if support else None
    config = make_settings(k=0 if support else K)
    state = run(hidden, head, ids, config, support_ids, weight_inputs=(factor, jnp.float32(0.6)))
    z = oracle.head_logits(hidden, head)
    entropy = oracle.head_gather(z, np.asarray(ids), np.zeros((TOKENS, 0), int))[1]
    truth = (1 + 0.6 * np.clip(1 - entropy / np.log(VOCABULARY), 0, 1)) * factor
    np.testing.assert_allclose(state.weight, truth, rtol=1e-5)
    assert run(hidden, head, ids, config, support_ids).weight is None


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    limit=st.integers(1, VOCABULARY),
    levels=st.integers(0, 3),
    k=st.sampled_from([K, 40]),
    seed=st.integers(0, 1000),
)
def test_any_whole_numbers_equal_oracle(limit, levels, k, seed):
    check(*whole(levels=levels, seed=seed), make_settings(k=k), limit=limit)


def shapes(tokens, width, vocabulary, support=0, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    return (
        shape((tokens, width), dtype),
        shape((vocabulary, width), dtype),
        shape((tokens,), jnp.int32),
        shape((tokens, support), jnp.int32),
        shape((), jnp.float32),
        None,
    )


@pytest.mark.parametrize(
    ("k", "support", "kernel"),
    [(16, 0, "statistics"), (64, 0, "statistics"), (0, 0, "statistics"), (0, 64, "picks")],
)
def test_lowers_for_a_tpu_without_logits(k, support, kernel):
    config = make_settings(151936, k, interpret=False, blocks=None)
    inputs = shapes(16384, 4096, 151936, support)
    text = forward.trace(*inputs, config).lower(lowering_platforms=("tpu",)).as_text()
    assert f"fireopd_head_{kernel}" in text and text.count("tpu_custom_call") == 1
    assert not re.search(r"tensor<(16384x151936|151936x16384)x", text)


def test_traces_under_shards_for_any_platform():
    """The kernel is lowered for a TPU and `chunked` for a CPU, on any machine."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    config = make_settings(600, 4, interpret=False, blocks=None)
    hidden, head, ids = normal(64)

    def local(*operands):
        pair = {"tpu": pallas_tpu.forward, "default": chunked.forward}
        pair = {
            name: functools.partial(each, limit=None, settings=config)
            for name, each in pair.items()
        }
        return lax.platform_dependent(*operands, **pair)

    by_token = P("data")
    specs = (by_token, P(), by_token, by_token, P())
    program = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_token, check_vma=False)
    )
    operands = (hidden, head, ids, jnp.zeros((64, 0), jnp.int32), jnp.float32(1))
    text = program.trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    z = oracle.head_logits(hidden, head)
    np.testing.assert_array_equal(program(*operands).top_ids, oracle.head_topk(z, 4)[0])


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        ((16384, 4096, 151936, 16, jnp.bfloat16), Blocks(1024, 512, 1024)),
        ((16384, 8192, 151936, 16, jnp.bfloat16), Blocks(1024, 512, 1024)),
        ((16384, 4096, 151936, 16, jnp.float32), Blocks(1024, 512, 1024)),
        ((16384, 8192, 151936, 16, jnp.float32), Blocks(256, 512, 1024)),
        ((1100, 2560, 151936, 16, jnp.bfloat16), Blocks(640, 512, 640)),
        ((1, 2880, 300, 16, jnp.bfloat16), Blocks(128, 384, 2880)),
        ((0, 64, 300, 0, jnp.float32), Blocks(128, 384, 64)),
    ],
)
def test_default_blocks(arguments, blocks):
    assert pallas_tpu.default_blocks(*arguments) == blocks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"dtype": jnp.float16}, "must be bfloat16 or float32, got float16"),
        ({"support": 127}, None),
        ({"support": 128}, "support_ids must be at most 127 a token, got 128"),
        ({"vocabulary": 2**24 + 1}, "vocabulary must be at most 16777216"),
        ({"width": 2880}, None),
        ({"width": 32768}, None),
        ({"width": 131072}, "width 131072 in bfloat16 is too wide for blocks of 44 MiB"),
        ({"tokens": 0, "k": 128}, None),
    ],
)
def test_refusal(change, words):
    shape = {"tokens": 16384, "width": 4096, "vocabulary": 151936, "support": 0, "k": 16}
    reason = pallas_tpu.unsupported_reason(**{**shape, "dtype": jnp.bfloat16, **change})
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (Blocks(tokens=100), "blocks.tokens must be a multiple of 128, got 100"),
        (Blocks(vocabulary=0), "blocks.vocabulary must be a multiple of 128, got 0"),
        (Blocks(width=96), "blocks.width must be a multiple of 128 that divides the width 384"),
        (Blocks(width=256), "or that width, got 256"),
    ],
)
def test_blocks_that_do_not_fit_are_named(blocks, words):
    with pytest.raises(ValueError, match=words):
        run(*normal(2, 300, width=384), make_settings(300, blocks=blocks))
