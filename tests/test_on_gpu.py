"""What a GPU computes is what a CPU computes: heads of real size, rollouts, draws, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.ops.attention import attend
from fireopd_jax.ops.head import head_gather, head_topk
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_dense_gpu import DenseGPU
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_gpu import PagedGPU
from fireopd_jax.rollout.sampling import Sampling, draw, row_keys
from fireopd_jax.verify import reference_batch as oracle
from tests.cases import (
    make_prompts,
    random_params,
    response_stats,
    skip_unless_hopper_kernels_run,
    through_cache,
    tiny_model,
)

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 5000,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
}
ROWS, WIDTH, ROOM = 14, 20, 24
PROMPTS = make_prompts(np.arange(1, ROWS + 1), WIDTH, vocab_size=SIZES["vocab_size"])


def on_cpu(function, *arguments):
    """Compute on the CPU, from copies of what lies on the GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(function)(*jax.device_get(arguments)))


def on_gpu(function, *arguments):
    return jax.device_get(jax.jit(function)(*arguments))


@pytest.fixture(params=[None, "reference", "chunked", "pallas_gpu", "pallas_gpu_rows"])
def implementation(request):
    if str(request.param).startswith("pallas"):
        skip_unless_hopper_kernels_run()
    return request.param


@pytest.mark.parametrize("k", [16, 64])
def test_heads_of_real_size_equal_the_oracle(implementation, k):
    tokens, width, vocabulary, seen = 1024, 1024, 151936, 48
    keys = jax.random.split(jax.random.key(k), 4)
    hidden = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    head = jax.random.normal(keys[1], (vocabulary, width), jnp.bfloat16) / 12
    ids = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    support_ids = jax.random.randint(keys[3], (tokens, 3), 0, vocabulary)
    options = {"logit_scale": jnp.float32(1.25), "implementation": implementation}

    top = on_gpu(lambda *a: head_topk(*a, k=k, **options), hidden, head, ids)
    given = on_gpu(lambda *a: head_gather(*a, **options), hidden, head, ids, support_ids)
    rows = np.linspace(0, tokens - 1, seen).astype(int)
    z = oracle.head_logits(
        np.asarray(hidden[rows], np.float64), np.asarray(head, np.float64), 1.25, None, vocabulary
    )
    logprob, entropy, logsumexp, support = oracle.head_gather(
        z, np.asarray(ids)[rows], np.asarray(support_ids)[rows]
    )
    top_ids, top_logprob = oracle.head_topk(z, k)
    for found in (top, given):
        np.testing.assert_allclose(found.logprob[rows], logprob, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found.entropy[rows], entropy, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found.logsumexp[rows], logsumexp, rtol=1e-6)
    np.testing.assert_allclose(given.support_logprob[rows], support, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(top.top_logprob[rows], top_logprob, atol=2e-5, rtol=1e-5)
    # Logits apart by less than the rounding of a sum of 1024 products may change places.
    assert (top.top_ids[rows] != top_ids).mean() < 0.01


def test_gradients_equal_those_of_full_logits(implementation):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (300, 128), jnp.bfloat16)
    head = jax.random.normal(keys[1], (5000, 128), jnp.bfloat16) / 4
    ids = jax.random.randint(keys[2], (300,), 0, 5000)
    support_ids = jax.random.randint(keys[3], (300, 5), 0, 5000)

    def loss(hidden, head, implementation=implementation):
        found = head_gather(hidden, head, ids, support_ids, implementation=implementation)
        return (found.logprob + found.support_logprob.sum(axis=1) + 0.1 * found.entropy).mean()

    def exact(hidden, head):
        return loss(hidden.astype(jnp.float32), head.astype(jnp.float32), "reference")

    ours = on_gpu(jax.grad(loss, (0, 1)), hidden, head)
    truth = on_cpu(jax.grad(exact, (0, 1)), hidden, head)
    for one, other in zip(ours, truth, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    "memory", [Dense(), Paged(page_size=16), PagedGPU(page_size=16), Dense(dtype="int8")], ids=str
)
def test_a_rollout_draws_what_a_cpu_draws(memory):
    model = tiny_model(**SIZES)
    params = random_params(model)

    def respond(params, memory=memory):
        sampling = Sampling.of((3, 17), ROOM, 3, top_p=0.95)
        return generate(
            model, params, PROMPTS, sampling, jnp.int32(7), max_tokens=ROOM, slots=5, memory=memory
        )

    plain = Paged(page_size=16) if isinstance(memory, PagedGPU) else memory
    wanted, got = on_cpu(lambda p: respond(p, plain), params), on_gpu(respond, params)
    np.testing.assert_array_equal(got.tokens[got.mask], wanted.tokens[got.mask])
    np.testing.assert_array_equal(got.mask, wanted.mask)
    tolerance = 1e-4 if memory.dtype == "model" else 2e-2
    for name in ("logprob", "model_logprob"):
        ours, truth = getattr(got, name), getattr(wanted, name)
        np.testing.assert_allclose(ours[got.mask], truth[got.mask], atol=tolerance)


def test_cudnn_attends_to_what_is_alive():
    rng = np.random.default_rng(0)
    rows, capacity, heads, shared, width = 5, 96, 8, 4, 64

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    q = normal(rows, 1, heads, width)
    kept = tuple((normal(rows, capacity, shared, width),) for _ in range(2))
    position = jnp.asarray([0, 1, 40, 63, capacity - 1], jnp.int32)
    mask = (jnp.arange(capacity)[None] <= position[:, None])[:, None]
    keys, values = (leaf.swapaxes(1, 2).astype(jnp.float32) for (leaf,) in kept)

    def ours(q, kept):
        return DenseGPU()._attend(kept, position, q, None, 0.125, jnp.dtype("bfloat16"))

    got = on_gpu(ours, q, kept)
    exact = q.astype(jnp.float32), keys, values, mask
    wanted = on_cpu(lambda *operands: attend(*operands, 0.125), *exact)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, atol=2e-2)


def test_a_cache_for_cudnn_holds_what_a_plain_one_holds():
    model = tiny_model(dtype="bfloat16", num_hidden_layers=2, head_dim=64)
    params, prompt = random_params(model), np.array([9, 1, 16], np.int32)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 32, length + 8).astype(np.int32) for length in prompt]
    wanted = through_cache(model, params, rows, prompt, Dense())
    got = through_cache(model, params, rows, prompt, DenseGPU())
    for one, other in zip(got, wanted, strict=True):
        assert np.linalg.norm(one - other) < 2e-2 * np.linalg.norm(other)


def test_scores_and_gradients_equal_those_of_a_cpu():
    model = tiny_model(**SIZES)
    params = random_params(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], (ROWS, ROOM)).astype(np.int32)
    mask = np.arange(ROOM)[None] < rng.integers(1, ROOM, ROWS)[:, None]

    def score(params):
        stats = response_stats(model, params, PROMPTS.tokens, PROMPTS.length, tokens, mask)
        return jnp.where(mask, stats.logprob + 0.1 * stats.entropy, 0).sum() / mask.sum()

    ours = on_gpu(jax.value_and_grad(score), params)
    truth = on_cpu(jax.value_and_grad(score), params)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05, "temperature": 0.7}],
    ids=str,
)
def test_draws_from_a_real_vocabulary_equal_those_of_a_cpu(knobs):
    rows, vocabulary = 64, 151936
    logits = 3 * jax.random.normal(jax.random.key(1), (rows, vocabulary), jnp.float32)

    def drawn(logits):
        sampling = Sampling.of((), 8, 5, **knobs)
        keys = row_keys(sampling.seed, jnp.arange(rows, dtype=jnp.int32), jnp.int32(4))
        return draw(logits, keys, sampling, jnp.int32(4))

    ours, truth = on_gpu(drawn, logits), on_cpu(drawn, logits)
    np.testing.assert_array_equal(ours.token, truth.token)
    np.testing.assert_allclose(ours.logprob, truth.logprob, atol=2e-5)
    np.testing.assert_allclose(ours.model_logprob, truth.model_logprob, atol=2e-5)
