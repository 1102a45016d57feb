"""The GPU kernels in JAX's interpreter of them and on a GPU, against the oracle; what they refuse.

The interpreter runs each warpgroup as a thread, and has been seen to wait for ever where XLA's own
threads were too few for them. So it runs apart, in a process of its own that may be ended; several
cases share one, for most of their time is starting and compiling.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fireopd_jax.ops import chunked, pallas_gpu, pallas_gpu_rows, pallas_gpu_tile
from fireopd_jax.ops.blocks import Blocks
from fireopd_jax.ops.logits import HeadSettings
from fireopd_jax.verify import reference_batch as oracle
from tests.cases import skip_unless_hopper_kernels_run

ROOT = Path(__file__).parents[2]
NEEDS_MOSAIC = pytest.mark.skipif(
    jax.__version_info__ < pallas_gpu_tile.OLDEST_JAX,
    reason=f"Mosaic GPU kernels need JAX 0.11, this is {jax.__version__}",
)
NEEDS_INTERPRETER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2),
    reason=f"the interpreter of Mosaic GPU kernels needs JAX 0.11.2, this is {jax.__version__}",
)
BOTH = (pallas_gpu, pallas_gpu_rows)
INTERPRET = jax.default_backend() == "cpu"
LONGEST = 400
"""Seconds for a process; an idle machine needs a twentieth."""


def make_inputs(tokens, vocabulary, width=64, support=0, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    head = jnp.asarray(rng.normal(size=(vocabulary, width)) / 4, dtype)
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    support_ids = jnp.asarray(rng.integers(-1, vocabulary, (tokens, support)), jnp.int32)
    return hidden, head, ids, support_ids


def whole_inputs(tokens, vocabulary, columns, seed=0):
    """Whole numbers: every product is exact, so many logits are equal, bit by bit."""
    rng = np.random.default_rng(seed)
    hidden, head = np.zeros((tokens, 64)), np.zeros((vocabulary, 64))
    hidden[:, :2] = rng.integers(1, 3, (tokens, 2))
    head[columns, :2] = rng.integers(0, 2, (len(columns), 2))
    ids = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    none = jnp.zeros((tokens, 0), jnp.int32)
    return jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16), ids, none


@functools.cache
def jitted(module, settings, processors):
    def forward(inputs, scale, limit, weight_inputs):
        return module.forward(*inputs, scale, limit, settings, weight_inputs)

    return jax.jit(forward)


def run(module, inputs, k, scale=1.0, limit=None, weight_inputs=None, **options):
    options = {"vocabulary": inputs[1].shape[0], "chunk": 256, **options}
    settings = HeadSettings(k=k, blocks=Blocks(vocabulary=128), interpret=INTERPRET, **options)
    forward = jitted(module, settings, pallas_gpu_tile.PROCESSORS)
    limit = None if limit is None else jnp.int32(limit)
    return jax.tree.map(np.asarray, forward(inputs, jnp.float32(scale), limit, weight_inputs))


def check(module, inputs, k, scale=1.0, softcap=None, limit=None, tolerance=2e-5, **options):
    found = run(module, inputs, k, scale, softcap=softcap, limit=limit, **options)
    hidden, head, ids, support_ids = (np.asarray(each, np.float64) for each in inputs)
    ids, support_ids = ids.astype(int), support_ids.astype(int)
    columns = options.get("vocabulary", len(head)) if limit is None else limit
    z = oracle.head_logits(hidden, head, scale, softcap, columns)
    inside = ids < columns
    logprob, entropy, logsumexp, support = oracle.head_gather(
        z, np.where(inside, ids, 0), support_ids
    )
    top_ids, top_logprob = oracle.head_topk(z, k)
    log_s = np.log(found.sum_exp)
    lse = found.max_logit + log_s
    for ours, truth in (
        (lse, logsumexp),
        (log_s - found.sum_exp_logit / found.sum_exp, entropy),
        (found.id_logit - lse, np.where(inside, logprob, -np.inf)),
        (found.support_logits - lse[:, None], support),
        (found.top_logits - lse[:, None], top_logprob),
    ):
        np.testing.assert_allclose(ours, truth, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found.top_ids, top_ids)
    assert (found.id_logit <= found.max_logit).all() and (
        found.support_logits <= found.max_logit[:, None]
    ).all()
    return found


def values_of_several_ranges():
    for module in BOTH:
        hidden, head, _, support_ids = make_inputs(70, 1000, support=3)
        # The most probable id: its logit is the maximum, which a sum in another order may exceed.
        ids = jnp.argmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32).T, axis=1)
        check(module, (hidden, head, ids.astype(jnp.int32), support_ids), 16, scale=1.7)
        # 5 leaves slots of the list unused; the head is padded, and an id may lie in the padding.
        options = {"softcap": 2.0, "vocabulary": 700, "scale": 1 / 0.7}
        hidden, head, ids, support_ids = make_inputs(5, 800, support=2)
        check(module, (hidden, head, ids % 700, support_ids % 700), 5, **options)
        check(module, make_inputs(3, 640), 0)


def one_range():
    # As if there were one processor: nothing to gain by ranges.
    pallas_gpu_tile.PROCESSORS = 1
    for module in BOTH:
        # More than 128 tokens: a pair of blocks shares its tiles.
        inputs = make_inputs(130, 520)
        factor = jnp.linspace(1.0, 2.0, 130)
        found = check(module, inputs, 16, weight_inputs=(factor, jnp.float32(0.7)))
        z = oracle.head_logits(*(np.asarray(each, np.float64) for each in inputs[:2]))
        entropy = oracle.head_gather(z, inputs[2], inputs[3])[1]
        expected = (1 + 0.7 * (1 - entropy / np.log(520))) * factor
        np.testing.assert_allclose(found.weight, expected, rtol=2e-5)
        check(module, make_inputs(2, 520, dtype=jnp.float16), 1)
    check(pallas_gpu_rows, make_inputs(4, 300, dtype=jnp.float32), 3)


def weights_of_several_ranges():
    for module in BOTH:
        inputs = make_inputs(2, 520)
        weight_inputs = jnp.ones(2), jnp.float32(0.5)
        found = run(module, inputs, 2, weight_inputs=weight_inputs)
        entropy = np.log(found.sum_exp) - found.sum_exp_logit / found.sum_exp
        expected = 1 + 0.5 * (1 - entropy / np.log(520))
        np.testing.assert_allclose(found.weight, expected, rtol=1e-6)


def equals_come_lowest_id_first():
    # Many more equals than slots: within one slice and across slices, tiles, chunks and ranges.
    # Few larger ones: of the zeros that fill the list before them, those of the lowest ids stay.
    few, dense = [300, 301, 400], list(range(128, 170))
    spread = np.random.default_rng(1).choice(600, 100, replace=False)
    for processors, sets in ((1, (few, dense)), (132, (spread, []))):
        pallas_gpu_tile.PROCESSORS = processors
        for module in BOTH:
            for columns in sets:
                check(module, whole_inputs(6, 600, columns), 16)


def columns_that_do_not_exist():
    for module in BOTH:
        found = check(module, make_inputs(3, 6), 16)
        assert (found.top_ids[:, 6:] == -1).all() and np.isneginf(found.top_logits[:, 6:]).all()
        inputs = make_inputs(4, 300, support=2)
        for limit in (130, 300):
            check(module, inputs, 4, limit=limit)
        found = run(module, inputs, 4, limit=0)
        np.testing.assert_array_equal(found.max_logit, np.full(4, -1e30, np.float32))
        for zero in (found.sum_exp, found.sum_exp_logit):
            np.testing.assert_array_equal(zero, 0)
        for nothing in (found.id_logit, found.support_logits, found.top_logits):
            assert np.isneginf(nothing).all()
        np.testing.assert_array_equal(found.top_ids, -1)


def few_tokens_and_large_logits():
    for module in BOTH:
        hidden, head, ids, support_ids = make_inputs(1, 200, support=1)
        check(module, (hidden, head, ids, support_ids), 2)
        found = run(module, (hidden[:0], head, ids[:0], support_ids[:0]), 2)
        assert found.max_logit.shape == (0,) and found.top_ids.shape == (0, 2)
        check(module, (hidden * 1e4, head, ids, support_ids), 2, tolerance=1e-4)


def spoilt_rows():
    for module in BOTH:
        inputs = make_inputs(5, 300)
        clean = run(module, inputs, 4)
        for spoiler in (np.nan, np.inf):
            hidden = inputs[0].at[2, 3].set(spoiler)
            found = run(module, (hidden, *inputs[1:]), 4)
            assert np.isnan(found.sum_exp[2]) and np.isnan(found.sum_exp_logit[2])
            assert ((found.top_ids >= -1) & (found.top_ids < 300)).all()
            for name in (
                "max_logit",
                "sum_exp",
                "sum_exp_logit",
                "id_logit",
                "top_logits",
                "top_ids",
            ):
                ours, before = getattr(found, name), getattr(clean, name)
                np.testing.assert_array_equal(np.delete(ours, 2, 0), np.delete(before, 2, 0))
        head = inputs[1].at[200, 0].set(np.nan)
        found = run(module, (inputs[0], head, *inputs[2:]), 4)
        assert np.isnan(found.sum_exp).all()
        assert ((found.top_ids >= -1) & (found.top_ids < 300)).all()


def inside_shard_map():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tokens",))
    inputs = make_inputs(6, 300)
    for module in BOTH:
        settings = HeadSettings(vocabulary=300, chunk=256, k=2, interpret=True)
        forward = jax.shard_map(
            lambda *inputs, module=module, settings=settings: module.forward(
                *inputs, jnp.float32(1.0), None, settings
            ),
            mesh=mesh,
            in_specs=(P("tokens"), P(), P("tokens"), P("tokens")),
            out_specs=P("tokens"),
            check_vma=False,
        )
        jax.jit(forward).trace(*inputs)


CASES = [
    (values_of_several_ranges, few_tokens_and_large_logits),
    (one_range, weights_of_several_ranges),
    (equals_come_lowest_id_first,),
    (columns_that_do_not_exist, spoilt_rows, inside_shard_map),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [case for cases in CASES for case in cases if case is not inside_shard_map]
)
def test_equals_oracle_on_a_gpu(case, monkeypatch):
    skip_unless_hopper_kernels_run()
    # Some cases act as if there were another number of processors.
    monkeypatch.setattr(pallas_gpu_tile, "PROCESSORS", pallas_gpu_tile.PROCESSORS)
    case()


@NEEDS_INTERPRETER
@pytest.mark.parametrize("cases", CASES, ids=lambda cases: cases[0].__name__)
def test_equals_oracle_in_the_interpreter(cases):
    names = [case.__name__ for case in cases]
    command = [sys.executable, __file__, *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        try:
            done = subprocess.run(
                command, env=environment, timeout=LONGEST, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            continue
        assert done.returncode == 0, done.stdout + done.stderr
        return
    pytest.fail(f"{names} did not end twice")


@NEEDS_MOSAIC
@pytest.mark.parametrize("module", BOTH)
def test_a_program_for_several_platforms_holds_the_kernel_and_runs_here(module):
    inputs = make_inputs(4, 300, support=1)
    settings = HeadSettings(vocabulary=300, chunk=128, k=3)

    def by(forward):
        return lambda *inputs: forward(*inputs, jnp.float32(1.0), None, settings)

    @jax.jit
    def either(*inputs):
        return lax.platform_dependent(*inputs, cuda=by(module.forward), default=by(chunked.forward))

    for ours, truth in zip(
        jax.tree.leaves(either(*inputs)), jax.tree.leaves(by(chunked.forward)(*inputs)), strict=True
    ):
        np.testing.assert_allclose(ours, truth, rtol=1e-6)
    assert "mpmd_map" in str(either.trace(*inputs).jaxpr)


@pytest.mark.parametrize("module", BOTH)
def test_older_jax_is_refused_with_its_version(module, monkeypatch):
    monkeypatch.setattr(pallas_gpu_tile, "OLDEST_JAX", (99, 1))
    reason = module.unsupported_reason(4096, 1024, 50000, 0, 16, jnp.bfloat16)
    assert reason == f"Mosaic GPU kernels need JAX 99.1 or newer, this is {jax.__version__}"


@pytest.mark.parametrize(
    ("module", "change", "words"),
    [
        (pallas_gpu, {}, None),
        (pallas_gpu, {"tokens": 0, "vocabulary": 1, "k": 0, "dtype": jnp.float16}, None),
        (pallas_gpu, {"dtype": jnp.float32}, "bfloat16 or float16, got float32"),
        (pallas_gpu, {"width": 1000}, "width must be a multiple of 64, got 1000"),
        (pallas_gpu, {"k": 129}, "k must be at most 128, got 129"),
        (pallas_gpu_rows, {"dtype": jnp.float32, "width": 1000, "support": 500}, None),
        (pallas_gpu_rows, {"k": 129}, "k must be at most 128, got 129"),
    ],
)
def test_what_a_kernel_cannot_do_is_named(module, change, words, monkeypatch):
    monkeypatch.setattr(pallas_gpu_tile, "OLDEST_JAX", (0,))
    shape = {"tokens": 4096, "width": 1024, "vocabulary": 50000, "support": 0, "k": 16}
    reason = module.unsupported_reason(**{**shape, "dtype": jnp.bfloat16, **change})
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize("k", [0, 16, 64, 65, 128])
def test_default_blocks_fit_an_h200(k):
    registers, shared = 232, 232448
    blocks = pallas_gpu.default_blocks(16384, 4096, 151936, k, jnp.bfloat16)
    # Logits of two warpgroups, and values and ids of the list.
    assert (blocks.vocabulary * 64 + 2 * k * 64) / 128 < registers
    assert (blocks.tokens + blocks.vocabulary) * blocks.width * 2 * pallas_gpu.STAGES < shared
    blocks = pallas_gpu_rows.default_blocks(16384, 4096, 151936, k, jnp.bfloat16)
    assert 2 * blocks.tokens * blocks.vocabulary * 4 * pallas_gpu_rows.STAGES < shared


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Blocks(vocabulary=96), "blocks.vocabulary must be 64, 128, 192 or 256, got 96"),
        (Blocks(vocabulary=512), "got 512"),
        (Blocks(tokens=64), "blocks.tokens must be 128 here, got 64"),
        (Blocks(width=128), "blocks.width must be 64 here, got 128"),
    ],
)
def test_blocks_that_a_kernel_cannot_have_are_named(asked, words):
    settings = HeadSettings(vocabulary=300, chunk=128, blocks=asked)
    own = pallas_gpu.default_blocks(1, 64, 300, 0, jnp.bfloat16)
    with pytest.raises(ValueError, match=words):
        pallas_gpu_tile.resolve_blocks(settings, own)
    settings = dataclasses.replace(settings, blocks=Blocks(vocabulary=192))
    assert pallas_gpu_tile.resolve_blocks(settings, own) == dataclasses.replace(own, vocabulary=192)


def test_few_tokens_split_the_vocabulary_among_the_processors():
    # 151936 columns are 594 tiles of 256. 128 blocks of tokens already fill 132 processors.
    assert pallas_gpu_tile.num_ranges(128, 594) == 1
    assert pallas_gpu_tile.num_ranges(64, 594) == 2
    assert 1 * pallas_gpu_tile.num_ranges(1, 594) > 100
    assert pallas_gpu_tile.num_ranges(1, 3) == 3


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
