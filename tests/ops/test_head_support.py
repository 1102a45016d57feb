"""Student statistics at given ids, soft cap and padded vocabulary: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireopd_jax.ops.head import head_gather, head_stats
from fireopd_jax.verify import reference_batch as oracle
from tests.cases import shapes_of

EACH = pytest.mark.parametrize("implementation", ["reference", "chunked"])


def make_inputs(tokens, vocabulary, k, width=5, dtype=jnp.float32, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * spread, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    support = jnp.asarray(rng.integers(-1, vocabulary, (tokens, k)), jnp.int32)
    cotangents = [jnp.asarray(rng.normal(size=tokens), jnp.float32) for _ in range(3)]
    cotangents.append(jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32))
    return hidden, head, ids, support, cotangents


def values_and_gradients(hidden, head, ids, support, cotangents, **options):
    def values(hidden, head):
        stats = head_gather(hidden, head, ids, support, **options)
        return stats.logprob, stats.entropy, stats.logsumexp, stats.support_logprob

    @jax.jit
    def both(hidden, head, cotangents):
        found, pull = jax.vjp(values, hidden, head)
        return found, pull(cotangents)

    return both(hidden, head, tuple(cotangents))


def check(inputs, implementation, chunk, tolerance=2e-5, gradient_tolerance=2e-5, **options):
    hidden, head, ids, support, cotangents = inputs
    settings = {"implementation": implementation, "chunk": chunk, **options}
    scale = settings.get("logit_scale", 1.0)
    rest = {key: options.get(key) for key in ("softcap", "valid")}
    ours, gradients = values_and_gradients(*inputs, **settings)
    z = oracle.head_logits(hidden, head, scale, **rest)
    truth = oracle.head_gather(z, np.asarray(ids), np.asarray(support))
    for value, expected in zip(ours, truth, strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
    truth = oracle.head_gather_gradients(
        hidden, head, np.asarray(ids), np.asarray(support), cotangents, scale, **rest
    )
    for value, source, expected in zip(gradients, (hidden, head), truth, strict=True):
        assert value.dtype == source.dtype
        # A lone column's gradients are 0: the size of what cancels is the measure.
        size = max(1.0, np.abs(expected).max(initial=0))
        value = np.asarray(value, np.float64)
        np.testing.assert_allclose(value, expected, rtol=0, atol=gradient_tolerance * size)


@EACH
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "k", "chunk"),
    [(5, 37, 4, 8), (5, 32, 64, 8), (1, 19, 1, 19), (0, 12, 3, 5), (4, 1, 2, 3), (3, 20, 0, 7)],
)
def test_equals_oracle(implementation, tokens, vocabulary, k, chunk):
    inputs = make_inputs(tokens, vocabulary, k)
    check(inputs, implementation, chunk, logit_scale=1 / 0.7)


@EACH
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("valid", [None, 29])
def test_options_equal_oracle(implementation, softcap, valid):
    hidden, head, ids, support, cotangents = make_inputs(6, 37, 5)
    inputs = (hidden, head, ids % 29, support, cotangents)
    check(inputs, implementation, 8, softcap=softcap, valid=valid, logit_scale=0.8)


@EACH
def test_bfloat16_equals_oracle(implementation):
    inputs = make_inputs(6, 41, 4, dtype=jnp.bfloat16)
    check(inputs, implementation, 16, gradient_tolerance=2**-6, softcap=5.0, valid=40)


@EACH
def test_huge_logits_equal_oracle(implementation):
    check(make_inputs(6, 41, 4, spread=1e4), implementation, 16, gradient_tolerance=1e-3)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 4),
    vocabulary=st.integers(1, 30),
    k=st.integers(0, 6),
    chunk=st.sampled_from([3, 8]),
    softcap=st.sampled_from([None, 3.0]),
    padding=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_oracle(tokens, vocabulary, k, chunk, softcap, padding, seed):
    hidden, head, ids, support, cotangents = make_inputs(
        tokens, vocabulary + padding, k, width=1 + seed % 5, seed=seed
    )
    inputs = (hidden, head, ids % vocabulary, support, cotangents)
    check(inputs, "chunked", chunk, softcap=softcap, valid=vocabulary)


@EACH
def test_repeated_ids_collect_their_cotangents(implementation):
    hidden, head, ids, _, cotangents = make_inputs(3, 13, 3)
    ids = jnp.asarray([4, 4, 12], jnp.int32)
    support = jnp.asarray([[4, 4, 4], [4, 0, 0], [12, 12, 3]], jnp.int32)
    check((hidden, head, ids, support, cotangents), implementation, 5)


@EACH
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_padding_of_the_support_has_no_value_and_no_gradient(implementation, broken):
    hidden, head, ids, support, cotangents = make_inputs(3, 13, 4)
    options = {"implementation": implementation, "chunk": 5}
    support = support.at[:, 2:].set(jnp.asarray([-1, 13], jnp.int32))
    cotangents[3] = cotangents[3].at[:, 2:].set(broken)
    found, gradients = values_and_gradients(hidden, head, ids, support, cotangents, **options)
    assert np.isneginf(found[3][:, 2:]).all()
    shorter = [*cotangents[:3], cotangents[3][:, :2]]
    expected = values_and_gradients(hidden, head, ids, support[:, :2], shorter, **options)
    np.testing.assert_array_equal(found[3][:, :2], expected[0][3])
    for ours, truth in zip(gradients, expected[1], strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-6)


@EACH
def test_padding_is_impossible_in_a_row_of_nan_too(implementation):
    hidden, head, ids, support, _ = make_inputs(3, 13, 4)
    support = support.at[:, 0].set(-1)
    stats = head_gather(
        hidden.at[1].set(jnp.nan), head, ids, support, implementation=implementation, chunk=5
    )
    assert np.isneginf(stats.support_logprob[:, 0]).all()
    assert np.isnan(stats.support_logprob[1, 1:][support[1, 1:] >= 0]).all()


def test_gradient_of_the_support_alone():
    hidden, head, ids, support, cotangents = make_inputs(4, 13, 3)
    support = jnp.maximum(support, 0)
    zero = jnp.zeros(4, jnp.float32)
    inputs = (hidden, head, ids, support, [zero, zero, zero, cotangents[3]])
    check(inputs, "chunked", 5)
    silent = cotangents[3].at[2].set(0.0)
    _, (d_hidden, d_head) = values_and_gradients(
        hidden.at[2].set(jnp.nan), head, ids, support, [zero, zero, zero, silent], chunk=5
    )
    assert np.isfinite(d_head).all() and np.any(d_head) and not np.any(d_hidden[2])


@EACH
def test_padded_columns_do_not_exist(implementation):
    hidden, head, ids, support, cotangents = make_inputs(4, 20, 3)
    options = {"implementation": implementation, "chunk": 8}
    ids, support = ids % 17, jnp.minimum(support, 16)
    nonsense = head.at[17:].set(jnp.nan)
    padded = values_and_gradients(hidden, nonsense, ids, support, cotangents, valid=17, **options)
    cut = values_and_gradients(hidden, head[:17], ids, support, cotangents, **options)
    for ours, truth in zip(jax.tree.leaves(padded[0]), jax.tree.leaves(cut[0]), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(padded[1][0], cut[1][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(padded[1][1][:17], cut[1][1], rtol=1e-5, atol=1e-6)
    assert not np.any(padded[1][1][17:])
    outside = head_stats(hidden, head, ids.at[0].set(18), valid=17, **options)
    assert np.isneginf(outside.logprob[0]) and np.isfinite(outside.logprob[1:]).all()


def test_statistics_do_not_depend_on_the_support():
    hidden, head, ids, support, _ = make_inputs(4, 37, 5)
    alone = head_stats(hidden, head, ids, chunk=8)
    joint = head_gather(hidden, head, ids, support, chunk=8)
    for name in ("logprob", "entropy", "logsumexp"):
        np.testing.assert_array_equal(getattr(joint, name), getattr(alone, name))
    with_own = head_gather(hidden, head, ids, ids[:, None], chunk=8)
    np.testing.assert_array_equal(with_own.support_logprob[:, 0], with_own.logprob)


@EACH
def test_leading_axes_are_kept(implementation):
    hidden, head, ids, support, _ = make_inputs(6, 13, 3)
    options = {"implementation": implementation, "chunk": 5}
    flat = head_gather(hidden, head, ids, support, **options)
    deep = head_gather(
        hidden.reshape(2, 3, -1), head, ids.reshape(2, 3), support.reshape(2, 3, 3), **options
    )
    assert deep.support_logprob.shape == (2, 3, 3)
    np.testing.assert_array_equal(deep.support_logprob.reshape(6, 3), flat.support_logprob)


@pytest.mark.parametrize(("implementation", "born"), [("chunked", False), ("reference", True)])
def test_no_array_has_the_size_of_the_logits(implementation, born):
    tokens, vocabulary = 11, 53
    inputs = make_inputs(tokens, vocabulary, 3)

    def both(hidden, head):
        options = {"implementation": implementation, "chunk": 8, "softcap": 4.0}
        return values_and_gradients(hidden, head, *inputs[2:], **options)

    shapes = set(shapes_of(jax.make_jaxpr(both)(*inputs[:2]).jaxpr))
    assert (tokens, 8) in shapes or born, "the walk does not reach the scan's body"
    assert any({tokens, vocabulary} <= set(shape) for shape in shapes) == born


def test_loss_and_gradient_of_a_large_vocabulary_need_little_scratch():
    arrays = [
        jax.ShapeDtypeStruct((1, 512, 1024), jnp.float32),
        jax.ShapeDtypeStruct((151936, 1024), jnp.float32),
        jax.ShapeDtypeStruct((1, 512), jnp.int32),
        jax.ShapeDtypeStruct((1, 512, 16), jnp.int32),
    ]

    def loss(hidden, head, ids, support):
        stats = head_gather(hidden, head, ids, support)
        return (stats.logprob + stats.entropy).sum() + stats.support_logprob.sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    # The logits alone would take 297 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 60 * 2**20
