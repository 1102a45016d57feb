"""Attention of packed rows against plain loops: values, gradients, windows, segments, poison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireopd_jax.ops.attention import AttentionBlocks, attention
from tests import oracle

SMALL = AttentionBlocks(queries=8, keys=16)
CHUNKED = {"implementation": "chunked", "blocks": SMALL}
EACH = pytest.mark.parametrize("options", [{"implementation": "reference"}, CHUNKED])
HEADS = pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (3, 1)])


def packed(*rows, length):
    """Segments 1, 2, ... of the given lengths in each row; a negative length is padding."""
    out = np.zeros((len(rows), length), np.int32)
    for i, lengths in enumerate(rows):
        at = 0
        for number, size in enumerate(lengths, start=1):
            if size > 0:
                out[i, at : at + size] = number
            at += abs(size)
    return out


SEGMENTS = packed((13, 1, 7, 1), (29,), (-3, 5, -4, 20), (), length=37)


def operands(shape, heads, shared, width=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, c = rng.normal(size=(2, *shape, heads, width))
    k, v = rng.normal(size=(2, shape[0], shared, shape[1], width))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, c))


@functools.partial(jax.jit, static_argnames=("options", "window"))
def compiled(q, k, v, c, segments, traced, positions, window, options):
    def run(q, k, v):
        window_ = window if traced is None else traced
        out = attention(q, k, v, segments, window=window_, positions=positions, **dict(options))
        return out

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(c)


def ours(arrays, segments, options, window=None, traced=None, positions=None):
    q, k, v, c = arrays
    return compiled(q, k, v, c, segments, traced, positions, window, tuple(sorted(options.items())))


def assert_close(found, truth, bound=1e-5):
    for one, other in zip(found, truth, strict=True):
        gap, largest = np.abs(np.asarray(one, np.float64) - other).max(), np.abs(other).max()
        # Where a token attends to itself alone, the exact gradient of its query is 0.
        assert gap <= bound * max(largest, 0.1), (gap, largest)


@EACH
@HEADS
def test_values_and_gradients_equal_plain_loops(heads, shared, options):
    arrays = operands(SEGMENTS.shape, heads, shared)
    assert_close(
        ours(arrays, SEGMENTS, options), oracle.attention(*arrays[:3], SEGMENTS, arrays[3])
    )


@EACH
def test_bfloat16_is_as_near_as_its_eight_bits(options):
    arrays = operands(SEGMENTS.shape, 4, 2, dtype=jnp.bfloat16)
    truth = oracle.attention(*arrays[:3], SEGMENTS, arrays[3])
    found = ours(arrays, SEGMENTS, options)
    assert all(each.dtype == jnp.bfloat16 for each in found)
    assert_close(found, truth, 2**-6)


@EACH
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("window", [1, 5])
def test_windows_count_tokens(window, traced, options):
    arrays = operands(SEGMENTS.shape, 4, 2)
    truth = oracle.attention(*arrays[:3], SEGMENTS, arrays[3], window)
    which = {"traced": jnp.int32(window)} if traced else {"window": window}
    assert_close(ours(arrays, SEGMENTS, options, **which), truth)


@EACH
def test_a_window_does_not_count_the_hole_between_prompt_and_response(options):
    segments = packed((9, -11, 17), (3, -17, 12), length=37)
    segments[segments > 0] = 1
    positions = (np.cumsum(segments, axis=1) - 1).clip(0).astype(np.int32)
    arrays = operands(segments.shape, 4, 2)
    truth = oracle.attention(*arrays[:3], segments, arrays[3], 6, positions)
    found = ours(arrays, segments, options, window=6, positions=jnp.asarray(positions))
    assert_close(found, truth)


def test_the_scale_is_the_callers():
    arrays = operands((1, 20), 2, 1)
    segments = np.ones((1, 20), np.int32)
    truth = oracle.attention(*arrays[:3], segments, arrays[3], scale=0.7)
    assert_close(ours(arrays, segments, CHUNKED | {"scale": 0.7}), truth)


@EACH
def test_padding_and_empty_batches_are_zero(options):
    arrays = operands((2, 20), 2, 1)
    arrays = tuple(x.at[:].set(jnp.nan) for x in arrays)
    for found in ours(arrays, np.zeros((2, 20), np.int32), options):
        np.testing.assert_array_equal(found, 0)
    none = operands((0, 20), 2, 1)
    assert ours(none, np.zeros((0, 20), np.int32), options)[0].shape == (0, 20, 2, 8)


def spread(found, clean, bad):
    """Check that `found` is NaN where `bad`, and bit-equal to `clean` elsewhere."""
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(bad, found.shape))
    np.testing.assert_array_equal(np.where(bad, 0, found), np.where(bad, 0, clean))


@EACH
@pytest.mark.parametrize("name", ["q", "k", "v", "c"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_where_it_is_attended_to(name, value, options):
    segments = packed((7, 9, 8), (24,), length=28)
    q, k, v, c = operands(segments.shape, 4, 2)
    clean = ours((q, k, v, c), segments, options, window=4)
    # Token 10 is the fourth of the second segment, token 26 is padding.
    arrays = {"q": q, "k": k, "v": v, "c": c}
    for at in (10, 26):
        place = (0, at, 1, 3) if name in "qc" else (0, 1, at, 3)
        arrays[name] = arrays[name].at[place].set(value)
    found = ours(tuple(arrays.values()), segments, options, window=4)
    reached = {10} if name in "qc" else {10, 11, 12, 13}
    before = {i - back for i in reached for back in range(4) if 7 <= i - back < 16}
    sets = (reached if name != "c" else set(), reached, before, before)
    for got, old, tokens, axis in zip(found, clean, sets, (1, 1, 2, 2), strict=True):
        bad = np.zeros(segments.shape, bool)
        bad[0, sorted(tokens)] = True
        bad = bad[:, :, None, None] if axis == 1 else bad[:, None, :, None]
        spread(np.asarray(got), np.asarray(old), bad)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(
        st.lists(st.integers(-9, 20).filter(bool), max_size=4), min_size=1, max_size=2
    ),
    queries=st.sampled_from([8, 24, 64]),
    keys=st.sampled_from([8, 40]),
    window=st.sampled_from([None, 3, 17]),
)
def test_any_lengths_and_blocks(lengths, queries, keys, window):
    rows = (*lengths, [5])[:2]
    segments = packed(*rows, length=45)
    arrays = operands(segments.shape, 2, 1, width=4)
    options = {"implementation": "chunked", "blocks": AttentionBlocks(queries, keys)}
    traced = jnp.int32(2**30 if window is None else window)
    truth = oracle.attention(*arrays[:3], segments, arrays[3], window)
    assert_close(ours(arrays, segments, options, traced=traced), truth)


@pytest.mark.parametrize("permuted", [False, True])
def test_ids_need_not_increase_and_rows_are_independent(permuted):
    arrays = operands(SEGMENTS.shape, 2, 1)
    names = np.array([0, 9, 2, 30, 4], np.int32)
    wanted = ours(arrays, SEGMENTS, CHUNKED)
    order = np.array([2, 0, 3, 1]) if permuted else np.arange(4)
    moved = tuple(x[order] for x in arrays)
    for one, other in zip(ours(moved, names[SEGMENTS][order], CHUNKED), wanted, strict=True):
        np.testing.assert_allclose(one, other[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"implementation": "chunkd"}, ValueError, r"'chunkd' \(did you mean 'chunked'\?\)"),
        ({"implementation": "splash", "window": jnp.int32(3)}, ValueError, "'splash': a traced"),
        ({"implementation": "triton", "window": 3}, ValueError, "'triton': it has no window"),
        ({"implementation": "triton"}, ValueError, "'triton': dtype float32 is not supported"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"blocks": AttentionBlocks(keys=0)}, ValueError, "blocks.keys must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_done_is_refused(change, error, message):
    q, k, v, _ = operands((1, 8), 2, 1)
    with pytest.raises(error, match=message):
        attention(q, k, v, jnp.ones((1, 8), jnp.int32), **change)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, _ = operands((1, 8), 3, 2)
    ones = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="key heads must divide the query heads"):
        attention(q, k, v, ones)
