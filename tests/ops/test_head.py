"""Head statistics: both implementations against the oracle, and what chunking must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fireopd_jax.ops import head as ops
from fireopd_jax.verify import reference_batch as oracle
from tests.cases import shapes_of

# One program a call: the operations by themselves take ten times as long to compile.
head_stats = jax.jit(ops.head_stats, static_argnames=("implementation", "chunk"))
EACH = pytest.mark.parametrize("implementation", ["reference", "chunked"])
SIZES = pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"),
    [(5, 37, 8), (5, 32, 8), (4, 6, 64), (1, 19, 19), (3, 20, 1), (0, 12, 5), (4, 1, 3)],
)


def make_inputs(tokens, vocabulary, width=7, dtype=jnp.float32, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)) * spread, dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)), dtype)
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    cotangents = [jnp.asarray(rng.normal(size=tokens), jnp.float32) for _ in range(3)]
    return hidden, head, ids, cotangents


def gradients(hidden, head, ids, cotangents, **options):
    def outcome(hidden, head):
        stats = head_stats(hidden, head, ids, **options)
        values = (stats.logprob, stats.entropy, stats.logsumexp)
        return sum(jnp.sum(c * value) for c, value in zip(cotangents, values, strict=True))

    return jax.jit(jax.grad(outcome, argnums=(0, 1)))(hidden, head)


def assert_close_per_leaf(ours, truth, tolerance=1e-5):
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth)
    assert ours.shape == truth.shape
    if truth.size:
        assert np.abs(ours - truth).max() <= tolerance * np.abs(truth).max() + 1e-12


@EACH
@SIZES
def test_equals_oracle(implementation, tokens, vocabulary, chunk):
    scale = 1 / 0.7
    hidden, head, ids, cotangents = make_inputs(tokens, vocabulary)
    options = {"implementation": implementation, "chunk": chunk, "logit_scale": scale}
    stats = head_stats(hidden, head, ids, **options)
    truth = oracle.head_stats(hidden, head, ids, scale)
    for ours, expected in zip((stats.logprob, stats.entropy, stats.logsumexp), truth, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    ours = gradients(hidden, head, ids, cotangents, **options)
    truth = oracle.head_gradients(hidden, head, ids, cotangents, scale)
    # One column: every gradient of log p and H is 0, and rounding is all there is to compare.
    tolerance = 1e-5 if vocabulary > 1 else 1e-4
    assert_close_per_leaf(ours[0], truth[0], tolerance)
    assert_close_per_leaf(ours[1], truth[1], tolerance)


@EACH
def test_bfloat16_inputs_give_float32_statistics(implementation):
    hidden, head, ids, cotangents = make_inputs(6, 41, dtype=jnp.bfloat16)
    options = {"implementation": implementation, "chunk": 16}
    stats = head_stats(hidden, head, ids, **options)
    truth = oracle.head_stats(hidden, head, ids)
    assert stats.entropy.dtype == jnp.float32
    np.testing.assert_allclose(stats.logprob, truth[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.entropy, truth[1], rtol=1e-5, atol=1e-5)
    d_hidden, d_head = gradients(hidden, head, ids, cotangents, **options)
    assert d_hidden.dtype == d_head.dtype == jnp.bfloat16
    expected = oracle.head_gradients(hidden, head, ids, cotangents)
    assert_close_per_leaf(d_hidden, expected[0], 2**-6)
    assert_close_per_leaf(d_head, expected[1], 2**-6)


def test_mixed_types():
    hidden, head, ids, cotangents = make_inputs(6, 41)
    head = head.astype(jnp.bfloat16)
    stats = head_stats(hidden, head, ids, chunk=16)
    np.testing.assert_allclose(stats.logprob, oracle.head_stats(hidden, head, ids)[0], atol=1e-5)
    d_hidden, d_head = gradients(hidden, head, ids, cotangents, chunk=16)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16)


def test_oracle_gradients_are_finite_differences():
    hidden, head, ids, cotangents = make_inputs(3, 11)
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)

    def outcome(hidden, head):
        stats = oracle.head_stats(hidden, head, ids, 0.8)
        return sum(float(c @ value) for c, value in zip(cotangents, stats, strict=True))

    cotangents = [np.asarray(c, np.float64) for c in cotangents]
    analytic = oracle.head_gradients(hidden, head, ids, cotangents, 0.8)
    for argument, gradient in zip((hidden, head), analytic, strict=True):
        for index in np.ndindex(argument.shape):
            before = argument[index]
            argument[index] = before + 1e-6
            above = outcome(hidden, head)
            argument[index] = before - 1e-6
            below = outcome(hidden, head)
            argument[index] = before
            assert gradient[index] == pytest.approx((above - below) / 2e-6, abs=1e-7)


@EACH
def test_leading_axes_are_kept(implementation):
    hidden, head, ids, _ = make_inputs(6, 13)
    flat = head_stats(hidden, head, ids, implementation=implementation, chunk=5)
    deep = head_stats(
        hidden.reshape(2, 3, -1), head, ids.reshape(2, 3), implementation=implementation, chunk=5
    )
    assert deep.entropy.shape == (2, 3)
    np.testing.assert_array_equal(deep.logprob.reshape(-1), flat.logprob)


@EACH
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_bounds(implementation, spread):
    hidden, head, ids, _ = make_inputs(64, 50, spread=spread)
    stats = head_stats(hidden, head, ids, implementation=implementation, chunk=16)
    assert float(stats.logprob.max()) <= 0.0
    assert float(stats.entropy.min()) >= 0.0
    assert float(stats.entropy.max()) <= np.log(50) * (1 + 1e-6)


@EACH
def test_an_id_outside_the_vocabulary_is_impossible(implementation):
    hidden, head, _, _ = make_inputs(3, 13)
    ids = jnp.asarray([-1, 12, 13], jnp.int32)
    stats = head_stats(hidden, head, ids, implementation=implementation, chunk=5)
    np.testing.assert_array_equal(np.isfinite(stats.logprob), [False, True, False])
    assert np.isneginf(stats.logprob[0])
    assert np.isfinite(stats.entropy).all()


def test_nan_stays_in_its_row():
    hidden, head, ids, cotangents = make_inputs(4, 13)
    broken = hidden.at[2].set(jnp.nan)
    clean, stats = (head_stats(h, head, ids, chunk=5) for h in (hidden, broken))
    others = jnp.asarray([0, 1, 3])
    np.testing.assert_array_equal(stats.entropy[others], clean.entropy[others])
    assert np.isnan(stats.entropy[2]) and np.isnan(stats.logprob[2])
    # No one asks about the broken row: it must not reach the head through 0 * NaN.
    silent = [c.at[2].set(0.0) for c in cotangents]
    d_hidden, d_head = gradients(broken, head, ids, silent, chunk=5)
    expected = gradients(hidden, head, ids, silent, chunk=5)
    np.testing.assert_array_equal(d_hidden, expected[0])
    np.testing.assert_array_equal(d_head, expected[1])
    assert not np.any(d_hidden[2])
    # Someone asks: the other rows' own gradients still stand.
    d_hidden, _ = gradients(broken, head, ids, cotangents, chunk=5)
    assert np.isfinite(d_hidden[others]).all() and np.isnan(d_hidden[2]).all()


def test_columns_at_minus_infinity_have_probability_zero():
    hidden, head, ids, cotangents = make_inputs(4, 12)
    hidden = jnp.abs(hidden)
    head = head.at[9].set(-3e38)
    ids = jnp.where(ids == 9, 0, ids)
    stats = head_stats(hidden, head, ids, chunk=5)
    rest = head_stats(hidden, jnp.delete(head, 9, axis=0), ids - (ids > 9), chunk=5)
    np.testing.assert_allclose(stats.entropy, rest.entropy, rtol=1e-5)
    _, d_head = gradients(hidden, head, ids, cotangents, chunk=5)
    assert np.isfinite(d_head).all() and not np.any(d_head[9])


@EACH
def test_scale_is_traced_and_has_no_gradient(implementation):
    hidden, head, ids, _ = make_inputs(3, 13)
    traces = []

    @jax.jit
    def total(scale):
        traces.append(scale)
        stats = head_stats(
            hidden, head, ids, logit_scale=scale, implementation=implementation, chunk=5
        )
        return stats.logprob.sum() + stats.entropy.sum()

    first, second = total(jnp.float32(1.0)), total(jnp.float32(2.0))
    assert len(traces) == 1 and first != second
    assert jax.grad(total)(jnp.float32(1.5)) == 0.0


@pytest.mark.parametrize(("implementation", "born"), [("chunked", False), ("reference", True)])
def test_no_array_has_the_size_of_the_logits(implementation, born):
    tokens, vocabulary = 11, 53
    hidden, head, ids, cotangents = make_inputs(tokens, vocabulary)

    def both(hidden, head):
        options = {"implementation": implementation, "chunk": 8}
        stats = head_stats(hidden, head, ids, **options)
        return stats.entropy, gradients(hidden, head, ids, cotangents, **options)

    shapes = set(shapes_of(jax.make_jaxpr(both)(hidden, head).jaxpr))
    assert (tokens, 8) in shapes or born, "the walk does not reach the scan's body"
    assert any({tokens, vocabulary} <= set(shape) for shape in shapes) == born


def test_sharded_rows_equal_one_device():
    hidden, head, ids, cotangents = make_inputs(16, 37)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))

    @jax.jit
    def both(hidden, head, ids, cotangents):
        stats = head_stats(hidden, head, ids, chunk=8)
        return stats, gradients(hidden, head, ids, cotangents, chunk=8)

    single = both(hidden, head, ids, cotangents)
    spread = both(
        *jax.device_put((hidden,), sharding), head, jax.device_put(ids, sharding), cotangents
    )
    for one, many in zip(jax.tree.leaves(single), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


def test_unknown_names_are_refused():
    hidden, head, ids, _ = make_inputs(2, 5)
    with pytest.raises(ValueError, match="'fast'; known: chunked, pallas_gpu"):
        head_stats(hidden, head, ids, implementation="fast")
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        head_stats(hidden, head, ids, chunk=0)
