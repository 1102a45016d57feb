"""Rows with given responses: chosen at random, the same in any batch."""

import dataclasses

import jax
import numpy as np
import pytest

from fireopd_jax.rollout.mixing import given_rows, mix, without
from fireopd_jax.types import Writer
from tests import cases

ROWS, ROOM = 6, 4


def prompts_with(references):
    prompts = cases.make_prompts([3] * ROWS, 5, sample_id=np.arange(ROWS) + 40)
    tokens = np.zeros((ROWS, ROOM), np.int32)
    length = np.asarray([len(r) for r in references], np.int32)
    for i, each in enumerate(references):
        tokens[i, : len(each)] = each
    return dataclasses.replace(prompts, reference=tokens, reference_length=length)


def test_the_lots_are_the_rows_own():
    prompts = cases.make_prompts([3] * 400, 5, sample_id=np.arange(400))
    given = given_rows(prompts, 0.7, seed=3)
    assert 80 < given.sum() < 160
    order = np.random.default_rng(0).permutation(400)
    again = given_rows(jax.tree.map(lambda x: x[order], prompts), 0.7, seed=3)
    np.testing.assert_array_equal(again, given[order])
    assert (given_rows(prompts, 0.7, seed=4) != given).any()
    assert not given_rows(prompts, 1.0, seed=3).any() and given_rows(prompts, 0.0, seed=3).all()


def test_given_responses_take_the_place_of_none():
    prompts = prompts_with([[7, 8, 2], [5, 2], [9, 9, 9, 2], [1, 2], [2], [4, 2]])
    given = np.array([True, False, True, False, False, True])
    own = without(prompts, given)
    np.testing.assert_array_equal(own.length, np.where(given, 0, 3))
    mask = np.broadcast_to(~given[:, None], (ROWS, ROOM))
    rollout = dataclasses.replace(cases.make_rollout(mask), prompts=own)
    got = jax.device_get(jax.jit(mix)(rollout, prompts, given))
    assert got.prompts.length.tolist() == [3] * ROWS
    for i in range(ROWS):
        if given[i]:
            length = prompts.reference_length[i]
            np.testing.assert_array_equal(got.tokens[i, :length], prompts.reference[i, :length])
            assert got.mask[i].sum() == length and got.finished[i]
            assert (got.writer[i] == Writer.REFERENCE).all() and not got.logprob[i].any()
        else:
            np.testing.assert_array_equal(got.tokens[i], rollout.tokens[i])
            np.testing.assert_array_equal(got.mask[i], mask[i])


def test_without_references_there_is_nothing_to_learn_from():
    prompts = cases.make_prompts([3] * ROWS, 5, sample_id=np.arange(ROWS))
    rollout = cases.make_rollout(np.ones((ROWS, ROOM), bool))
    with pytest.raises(ValueError, match="need references"):
        mix(rollout, prompts, np.ones(ROWS, bool))
