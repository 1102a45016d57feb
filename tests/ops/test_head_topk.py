"""Teacher statistics with top-K: exact, in the order of ties, whatever the chunks."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fireopd_jax.ops import topk
from fireopd_jax.ops.head import head_gather, head_stats, head_topk
from fireopd_jax.verify import reference_batch as oracle

EACH = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def make_inputs(tokens, vocabulary, width=6, dtype=jnp.float32, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * spread, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    return hidden, head, jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)


def find(hidden, head, ids, **options):
    return jax.jit(lambda *arrays: head_topk(*arrays, **options))(hidden, head, ids)


def check(hidden, head, ids, k, tolerance=2e-5, exact_ids=True, **options):
    found = find(hidden, head, ids, k=k, **options)
    rest = {key: options.get(key) for key in ("softcap", "valid")}
    z = oracle.head_logits(hidden, head, options.get("logit_scale", 1.0), **rest)
    no_support = np.zeros((len(ids), 0), int)
    logprob, entropy, logsumexp, _ = oracle.head_gather(z, np.asarray(ids), no_support)
    top_ids, top_logprob = oracle.head_topk(z, k)
    assert found.top_ids.dtype == jnp.int32 and found.top_logprob.dtype == jnp.float32
    for ours, truth in (
        (found.logprob, logprob),
        (found.entropy, entropy),
        (found.logsumexp, logsumexp),
        (found.top_logprob, top_logprob),
    ):
        np.testing.assert_allclose(ours, truth, rtol=tolerance, atol=tolerance)
    if exact_ids:
        np.testing.assert_array_equal(found.top_ids, top_ids)
    return found


@EACH
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "k", "chunk"),
    [
        (5, 37, 4, 8),
        (5, 37, 1, 8),
        (5, 37, 37, 8),
        (5, 37, 20, 6),
        (4, 6, 9, 4),
        (1, 300, 3, 150),
        (0, 12, 3, 5),
        (3, 1, 1, 5),
        (3, 700, 128, 512),
        (3, 1100, 2, 1030),
    ],
)
def test_equals_oracle(implementation, tokens, vocabulary, k, chunk):
    inputs = make_inputs(tokens, vocabulary)
    check(*inputs, k, implementation=implementation, chunk=chunk, logit_scale=1 / 0.7)


@EACH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_options_equal_oracle(implementation, dtype):
    hidden, head, ids = make_inputs(6, 41, dtype=dtype)
    options = {"implementation": implementation, "chunk": 16, "softcap": 6.0, "valid": 29}
    check(hidden, head, ids % 29, 5, **options)


@EACH
def test_huge_logits_equal_oracle(implementation):
    hidden, head, ids = make_inputs(6, 41, spread=1e4)
    check(hidden, head, ids, 5, implementation=implementation, chunk=16)


@EACH
@pytest.mark.parametrize("k", [1, 4, 8, 30])
def test_equal_logits_come_lowest_id_first(implementation, k):
    # Whole numbers: every product is exact, so equal columns are equal bits in any chunk.
    rng = np.random.default_rng(k)
    hidden = jnp.asarray(rng.integers(-2, 3, (9, 3)), jnp.float32)
    head = jnp.asarray(rng.integers(-1, 2, (150, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 150, 9), jnp.int32)
    check(hidden, head, ids, k, implementation=implementation, chunk=64)


@EACH
def test_a_block_of_equals_across_groups_and_chunks(implementation):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.integers(1, 3, (4, 2)), jnp.float32)
    head = np.zeros((1500, 2), np.float32)
    head[rng.choice(1500, 100, replace=False)] = 1.0
    ids = jnp.zeros(4, jnp.int32)
    for k in (16, 100, 120):
        check(hidden, jnp.asarray(head), ids, k, implementation=implementation, chunk=1024)


@EACH
def test_no_state_means_a_uniform_distribution(implementation):
    _, head, ids = make_inputs(3, 50)
    hidden = jnp.zeros((3, 6), jnp.float32)
    found = check(hidden, head, ids, 4, implementation=implementation, chunk=16)
    np.testing.assert_array_equal(found.top_ids, np.tile(np.arange(4), (3, 1)))
    np.testing.assert_allclose(found.entropy, np.log(50), rtol=1e-6)


@EACH
def test_fewer_columns_than_asked_for(implementation):
    hidden, head, ids = make_inputs(3, 20)
    options = {"implementation": implementation, "chunk": 8}
    found = check(hidden, head, ids % 5, 7, valid=5, **options)
    np.testing.assert_array_equal(found.top_ids[:, 5:], -1)
    assert np.isneginf(found.top_logprob[:, 5:]).all()
    np.testing.assert_allclose(np.exp(found.top_logprob).sum(axis=1), 1.0, rtol=1e-5)
    # What was found is a support that can be read back.
    again = head_gather(hidden, head, ids % 5, found.top_ids, valid=5, **options)
    np.testing.assert_allclose(again.support_logprob, found.top_logprob, rtol=1e-6)


@EACH
def test_an_impossible_column_is_never_named(implementation):
    hidden, head, ids = make_inputs(3, 6)
    head = head.at[2].set(-3e38)
    found = find(jnp.abs(hidden) + 1, head, ids, k=6, implementation=implementation, chunk=4)
    assert 2 not in np.asarray(found.top_ids)
    np.testing.assert_array_equal(found.top_ids[:, 5], -1)
    assert np.isneginf(found.top_logprob[:, 5]).all()


@EACH
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_state_stays_in_its_row(implementation, broken):
    hidden, head, ids = make_inputs(4, 300)
    options = {"k": 3, "implementation": implementation, "chunk": 256}
    clean = find(hidden, head, ids, **options)
    found = find(hidden.at[2].set(broken), head, ids, **options)
    others = jnp.asarray([0, 1, 3])
    for ours, truth in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(ours[others], truth[others])
    assert np.isnan(found.logprob[2]) and np.isnan(found.entropy[2])
    assert ((found.top_ids >= -1) & (found.top_ids < 300)).all()


@EACH
def test_nothing_has_a_gradient(implementation):
    hidden, head, ids = make_inputs(3, 13)

    def outcome(hidden, head, scale):
        options = {"implementation": implementation, "chunk": 5, "logit_scale": scale}
        found = head_topk(hidden, head, ids, k=2, **options)
        return found.logprob.sum() + found.entropy.sum() + found.top_logprob.sum()

    for gradient in jax.grad(outcome, argnums=(0, 1, 2))(hidden, head, jnp.float32(1.0)):
        assert not np.any(gradient)


def test_leading_axes_are_kept_and_statistics_are_those_of_head_stats():
    hidden, head, ids = make_inputs(6, 37)
    flat = head_topk(hidden, head, ids, k=3, chunk=8)
    deep = head_topk(hidden.reshape(2, 3, -1), head, ids.reshape(2, 3), k=3, chunk=8)
    assert deep.top_ids.shape == deep.top_logprob.shape == (2, 3, 3)
    np.testing.assert_array_equal(deep.top_ids.reshape(6, 3), flat.top_ids)
    alone = head_stats(hidden, head, ids, chunk=8)
    for name in ("logprob", "entropy", "logsumexp"):
        np.testing.assert_array_equal(getattr(flat, name), getattr(alone, name))


@pytest.mark.parametrize(
    ("width", "k"), [(2048, 16), (2049, 16), (1100, 2), (512, 128), (40, 40), (4103, 128)]
)
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_two_stages_equal_one(width, k, levels):
    rng = np.random.default_rng(width + levels)
    values = jnp.asarray(rng.integers(0, levels, (7, width)), jnp.float32)
    best = topk.update(topk.empty(7, k), values, 0)
    for ours, truth in zip(best, lax.top_k(values, k), strict=True):
        np.testing.assert_array_equal(ours, truth)
    more = jnp.asarray(rng.integers(0, levels + 1, (7, width)), jnp.float32)
    best = topk.update(best, more, width)
    both = jnp.concatenate([values, more], axis=1)
    for ours, truth in zip(best, lax.top_k(both, k), strict=True):
        np.testing.assert_array_equal(ours, truth)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    vocabulary=st.integers(1, 200),
    k=st.sampled_from([1, 3, 20]),
    chunk=st.sampled_from([7, 96]),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_oracle(vocabulary, k, chunk, seed):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.integers(-3, 4, (3, 4)), jnp.float32)
    head = jnp.asarray(rng.integers(-2, 3, (vocabulary, 4)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, vocabulary, 3), jnp.int32)
    check(hidden, head, ids, k, chunk=chunk)


def sorted_widths(implementation, k):
    inputs = make_inputs(8, 4096)
    options = {"k": k, "implementation": implementation, "chunk": 1024}
    text = jax.jit(lambda *arrays: head_topk(*arrays, **options)).lower(*inputs).compile().as_text()
    assert "TopK" in text or "top-k" in text.lower(), "top_k compiles to something new"
    results = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? sort\(", text)
    return [int(shape.split(",")[-1]) for shape in results]


@pytest.mark.parametrize("k", [1, 16])
def test_no_row_is_sorted_whole(k):
    assert max(sorted_widths("chunked", k), default=0) <= k


def test_no_array_has_the_size_of_the_logits():
    inputs = make_inputs(11, 53)
    text = jax.jit(lambda *arrays: head_topk(*arrays, k=3, chunk=8)).lower(*inputs).as_text()
    assert "tensor<11x8xf32>" in text
    assert not re.search(r"tensor<(11x53|53x11)x", text)


@pytest.fixture
def without_shape_checks():
    """Disable the shape hook of the tests, which would raise first; users have none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"head": np.zeros((6, 13), np.float32)}, ValueError, r"head of shape \(6, 13\).*\(4, 6\)"),
        ({"head": np.zeros((6, 13), np.float32)}, ValueError, "pass head_layout='dv'"),
        ({"ids": np.zeros(3, np.int32)}, ValueError, r"ids of shape \(3,\).*\(4, 6\)"),
        ({"ids": np.zeros(4, np.int64)}, TypeError, "ids must be int32, got int64"),
        ({"hidden": np.zeros((4, 6))}, TypeError, "hidden must be .* got float64"),
        ({"head": np.zeros((13, 6), np.int32)}, TypeError, "head must be .* got int32"),
        (
            {"support_ids": np.zeros((3, 2), np.int32)},
            ValueError,
            r"support_ids of shape \(3, 2\).*\(4,\)",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0, got 0.0"),
        ({"valid": 14}, ValueError, "valid must be 1 to 13, the vocabulary size of head, got 14"),
        ({"valid": 0}, ValueError, "got 0"),
    ],
)
def test_arrays_that_do_not_fit_are_named(without_shape_checks, change, error, words):
    hidden, head, ids = make_inputs(4, 13)
    arguments = {"hidden": hidden, "head": head, "ids": ids, "support_ids": ids[:, None]}
    with pytest.raises(error, match=words):
        head_gather(**{**arguments, **change})


@pytest.mark.parametrize("k", [0, 129])
def test_k_has_bounds(k):
    with pytest.raises(ValueError, match=f"k must be 1 to 128, got {k}"):
        head_topk(*make_inputs(2, 5), k=k)
