"""Buckets of similar lengths: every prompt in one, none wider than it needs by much."""

import numpy as np

from fireopd_jax.rollout.buckets import ALIGN, RATIO, SHORT, by_length


def test_one_long_prompt_does_not_widen_the_short_ones():
    assert by_length([30, 8000, 40, 20]) == [(48, [0, 2, 3]), (8000, [1])]


def test_short_prompts_are_one_bucket():
    assert by_length([1, SHORT, 7]) == [(SHORT, [0, 1, 2])]
    assert by_length([]) == []


def test_every_prompt_is_in_one_bucket_that_fits():
    lengths = np.random.default_rng(0).integers(1, 20_000, 500).tolist()
    buckets = by_length(lengths)
    assert sorted(i for _, own in buckets for i in own) == list(range(500))
    for width, own in buckets:
        longest, shortest = max(lengths[i] for i in own), min(lengths[i] for i in own)
        assert longest <= width < longest + ALIGN and width % ALIGN == 0
        assert shortest >= longest / RATIO or longest <= SHORT
    assert len(buckets) <= 5 and [w for w, _ in buckets] == sorted(w for w, _ in buckets)
