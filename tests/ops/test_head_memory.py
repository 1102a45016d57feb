"""Scratch memory that the compiler plans: unlike times, it is the same on every run."""

import jax
import jax.numpy as jnp
import pytest

from fireopd_jax.ops.head import head_gather, head_stats, head_topk

MIB = 2**20


def scratch_mib(function, tokens, width, vocabulary, k=16):
    shape = jax.ShapeDtypeStruct
    arrays = (
        shape((tokens, width), jnp.float32),
        shape((vocabulary, width), jnp.float32),
        shape((tokens,), jnp.int32),
        shape((tokens, k), jnp.int32),
    )
    compiled = jax.jit(function).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


def teacher(implementation):
    def run(hidden, head, ids, support):
        return head_topk(hidden, head, ids, k=16, implementation=implementation)

    return run


def student(implementation):
    def loss(hidden, head, ids, support):
        stats = head_gather(hidden, head, ids, support, implementation=implementation)
        return (stats.logprob + 0.1 * stats.entropy + stats.support_logprob.sum(-1)).mean()

    return jax.value_and_grad(loss, (0, 1))


@pytest.mark.parametrize(("role", "share"), [(teacher, 1 / 12), (student, 1 / 25)])
def test_chunks_need_a_fraction_of_the_plain_version(role, share):
    plain, ours = (scratch_mib(role(name), 2048, 256, 32768) for name in ("reference", None))
    # The plain one holds the logits at least once, or the comparison means nothing.
    assert plain > 2048 * 32768 * 4 / MIB
    assert ours <= share * plain


@pytest.mark.parametrize("width", [64, 1024])
def test_a_long_response_of_a_large_vocabulary_needs_under_60_mib(width):
    def loss(hidden, head, ids, support):
        stats = head_stats(hidden, head, ids)
        return (stats.logprob + 0.1 * stats.entropy).mean()

    gradients = jax.value_and_grad(loss, (0, 1))
    assert 0 < scratch_mib(gradients, 512, width, 151936) < 60
    assert 0 < scratch_mib(student(None), 512, width, 151936) < 60
