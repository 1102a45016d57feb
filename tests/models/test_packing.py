"""Packed rows: every token has its slot, and what predicts it; packs are few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireopd_jax.models import packing as packs

SHAPE, P, T = packs.PassShape(64, 2), 20, 40
LENGTH = SHAPE.length


@jax.jit
def pack(prompt, response):
    return packs.pack_rows(prompt, response, LENGTH, 2)


@jax.jit
def of_pack(packing, index, prompts, tokens):
    slots = packs.slots_of(packing, index, SHAPE)
    predicted = packs.predicted_by(packing, slots)
    ids = packs.tokens_at(slots, packing, prompts, tokens)
    return slots, predicted, ids, packs.gather_tokens(tokens, predicted)


def rows_of(lengths):
    prompt, response = (np.array(x, np.int32) for x in zip(*lengths, strict=True))
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 1000, (len(lengths), P)).astype(np.int32)
    tokens = rng.integers(1000, 2000, (len(lengths), T)).astype(np.int32)
    return prompt, response, prompts, tokens


rows = st.lists(st.tuples(st.integers(0, P), st.integers(0, T)), min_size=8, max_size=8)


@settings(max_examples=30, deadline=None)
@given(rows)
def test_every_token_is_once_in_a_pack_after_those_before_it(lengths):
    prompt, response, prompts, tokens = rows_of(lengths)
    packing = pack(prompt, response)
    seen, written = set(), jnp.zeros_like(tokens)
    for index in range(-(-int(packing.count) // SHAPE.packs)):
        # On the host: elements of device arrays take a program each.
        slots, predicted, ids, found = jax.device_get(of_pack(packing, index, prompts, tokens))
        for group, at in np.argwhere(np.asarray(slots.segment) > 0):
            row = int(slots.row[group, at]) + 4 * group
            place = int(slots.position[group, at])
            sequence = [*prompts[row, : prompt[row]], *tokens[row]]
            assert ids[group, at] == sequence[place]
            assert place == 0 or slots.segment[group, at - 1] == slots.segment[group, at]
            seen.add((row, place))
        segments = np.asarray(SHAPE.apart(slots.segment))
        assert (np.diff(np.where(segments > 0, segments, 10**6)) >= 0).all()
        for group, k in np.argwhere(np.asarray(predicted.there)):
            slot, token = predicted.slot[group, k], predicted.token[group, k]
            row = int(predicted.row[group, k]) + 4 * group
            assert slots.position[group, slot] == prompt[row] + token - 1
            assert predicted.rank[group, slot] == k
        written = packs.scatter_tokens(written, found, predicted)
    there = [(row, n + m - 1) for row, (n, m) in enumerate(lengths) if n and m]
    assert seen == {(row, at) for row, count in there for at in range(count)}
    mask = (np.arange(T)[None] < response[:, None]) & (prompt[:, None] > 0)
    np.testing.assert_array_equal(written, np.where(mask, tokens, 0))


@settings(max_examples=30, deadline=None)
@given(rows)
def test_packs_are_few(lengths):
    prompt, response, _, _ = rows_of(lengths)
    packing = pack(prompt, response)
    sizes = np.where((response > 0) & (prompt > 0), prompt + response - 1, 0).reshape(2, 4)
    for group in range(2):
        filled = np.bincount(packing.pack[group], weights=sizes[group], minlength=1)
        assert filled.max() <= LENGTH
        # First-fit decreasing: no two packs are half empty.
        assert np.sum((filled > 0) & (filled <= LENGTH / 2)) <= 1
    assert int(packing.count) == max(
        len(set(np.asarray(packing.pack[g])[sizes[g] > 0])) for g in range(2)
    )


def test_a_row_fills_a_pack():
    packing = packs.pack_rows(jnp.array([29, 29, 1]), jnp.array([36, 36, 1]), LENGTH)
    assert int(packing.count) == 3
    assert (np.asarray(packing.offset) == 0).all()


def test_values_of_rows_become_values_of_tokens():
    prompt, response, prompts, tokens = rows_of([(3, 4)] * 8)
    packing = pack(prompt, response)
    _, predicted, _, _ = of_pack(packing, 0, prompts, tokens)
    values = packs.gather_tokens(jnp.arange(8.0), predicted)
    assert values.shape == (2, SHAPE.tokens)
    rows = np.asarray(predicted.row) + np.array([[0], [4]])
    np.testing.assert_array_equal(values, np.where(predicted.there, rows, 0))


@pytest.mark.parametrize(
    ("longest", "tokens", "rows", "length", "count"),
    [
        (160, 640, 8, 160, 4),
        (64, 640, 16, 256, 2),
        (256, 8192, 64, 256, 32),
        (160, 512, 8, 160, 2),  # three packs of eight would leave one of nine empty
        (160, 1, 8, 160, 1),
        (34, 640, 64, 160, 4),
        (257, 1000, 64, 896, 1),
        (1000, 8192, 7, 1024, 7),  # four rows a pack would leave one of eight empty
        (1024, 8192, 64, 4096, 2),
        (16384, 8192, 8, 16384, 1),  # one row at least, whatever was asked
    ],
)
def test_a_pass_has_packs_for_the_longest_rows(longest, tokens, rows, length, count):
    assert packs.PassShape.of(longest, tokens, rows) == packs.PassShape(length, count)


@pytest.mark.parametrize(
    ("shape", "groups", "size"),
    [
        ((640, 1), 1, 128),
        ((64, 1), 1, 64),
        ((1024, 8), 1, 2048),
        ((160, 8), 1, 256),  # no divisor of 1,280: the last block has places for no token
        ((128, 8), 8, 1024),
    ],
)
def test_a_block_of_the_head_is_a_quarter_of_a_pass(shape, groups, size):
    assert packs.PassShape(*shape).head_block(groups) == size


def test_the_last_block_may_have_more_places_than_tokens():
    prompt, response, prompts, tokens = rows_of([(3, 4)] * 8)
    packing = pack(prompt, response)
    _, predicted, _, _ = of_pack(packing, 0, prompts, tokens)
    padded = predicted.padded(48)
    assert padded.slot.shape == (2, 144)
    assert not np.asarray(padded.there)[:, SHAPE.tokens :].any()
    np.testing.assert_array_equal(padded.part(96, 48).slot[:, :32], predicted.slot[:, 96:])


def test_tokens_and_rows_measure_no_pass_together():
    with pytest.raises(ValueError, match="expected one of the two"):
        packs.one_measure(128, 4)
