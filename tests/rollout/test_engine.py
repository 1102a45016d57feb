"""The decoding loop: where responses end, and what a response must not depend on.

Stop tokens do not change the random numbers. So a run without stop tokens determines all others:
the same responses, truncated after their first stop token or at the limit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate, shard_rows
from tests.cases import make_prompts, random_params, response_stats, tiny_model

ROWS, WIDTH, ROOM = 8, 5, 6
MODEL = tiny_model(num_hidden_layers=2)
PARAMS = random_params(MODEL)
LENGTHS = (5, 1, 3, 0, 4, 2, 5, 0)
REAL = np.array(LENGTHS) > 0
PROMPTS = make_prompts(LENGTHS, WIDTH, sample_id=10 + np.arange(ROWS))
FULL = make_prompts([5, 1, 3, 2, 4, 2, 5, 1], WIDTH, sample_id=10 + np.arange(ROWS))


@jax.jit
def run(params, prompts, sampling):
    return generate(MODEL, params, prompts, sampling, jnp.int32(4), max_tokens=ROOM)


@jax.jit
def scores(params, rollout, temperature):
    prompts = rollout.prompts
    return response_stats(
        MODEL, params, prompts.tokens, prompts.length, rollout.tokens, rollout.mask, temperature
    )


def respond(prompts=PROMPTS, stop=(), max_tokens=ROOM, seed=3, params=PARAMS, **knobs):
    rollout = run(params, prompts, Sampling.of(stop, max_tokens, seed, **knobs))
    return jax.tree.map(np.asarray, rollout)


@functools.cache
def unstopped():
    return respond()


def check(rollout, stop, limit=ROOM):
    """Compare with truncated responses of a run without stop tokens."""
    free = unstopped()
    for i in range(ROWS):
        tokens = [] if LENGTHS[i] == 0 else list(free.tokens[i, :limit])
        at = next((t for t, token in enumerate(tokens) if token in stop), None)
        length = len(tokens) if at is None else at + 1
        assert rollout.mask[i].tolist() == [t < length for t in range(ROOM)]
        assert rollout.tokens[i].tolist() == [*tokens[:length], *[0] * (ROOM - length)]
        assert rollout.finished[i] == (at is not None)
        assert (rollout.version[i] == np.where(rollout.mask[i], 4, -1)).all()
        assert (rollout.logprob[i][:length] < 0).all() and (rollout.logprob[i][length:] == 0).all()
        np.testing.assert_allclose(
            rollout.logprob[i, :length], free.logprob[i, :length], rtol=1e-5, atol=1e-6
        )
    return free


def test_without_stop_tokens_every_real_row_fills_its_room():
    check(unstopped(), ())
    assert (unstopped().mask == REAL[:, None]).all()
    assert len(np.unique(unstopped().tokens[REAL], axis=0)) == REAL.sum()


def test_the_stop_token_is_kept_and_nothing_follows_it():
    row, position = 0, 2
    stop = int(unstopped().tokens[row, position])
    rollout = respond(stop=(stop,))
    check(rollout, {stop})
    length = rollout.mask[row].sum()
    assert 0 < length <= position + 1 and rollout.tokens[row, length - 1] == stop
    assert rollout.finished[row] and not rollout.finished[~REAL].any()


def test_any_of_several_stop_tokens_ends_a_response():
    free = unstopped().tokens
    stop = (int(free[0, 1]), int(free[2, 3]), int(free[4, 4]))
    rollout = respond(stop=stop)
    check(rollout, set(stop))
    assert rollout.finished[[0, 2, 4]].all()


def test_all_may_end_at_their_first_token():
    stop = tuple(int(token) for token in set(unstopped().tokens[REAL, 0]))
    rollout = respond(stop=stop)
    check(rollout, set(stop))
    assert (rollout.mask.sum(axis=1) == REAL).all() and (rollout.finished == REAL).all()


@pytest.mark.parametrize("limit", [1, 4, ROOM, ROOM + 5])
def test_the_limit_may_be_below_the_room(limit):
    stop = int(unstopped().tokens[2, 3])
    check(respond(stop=(stop,), max_tokens=limit), {stop}, limit)


def test_a_stop_token_in_the_prompt_ends_nothing():
    free = unstopped().tokens
    unused = next(
        int(token) for token in PROMPTS.tokens[0, : LENGTHS[0]] if token not in free[REAL]
    )
    rollout = respond(stop=(unused,))
    check(rollout, {unused})
    assert not rollout.finished.any()


def test_rows_without_a_prompt_stay_empty_when_all_are():
    empty = respond(dataclasses.replace(PROMPTS, length=np.zeros(ROWS, np.int32)))
    assert not empty.mask.any() and not empty.finished.any() and not empty.tokens.any()


def test_order_and_batch_size_do_not_matter():
    def pick(order):
        return jax.tree.map(lambda x: x[order], PROMPTS)

    order = np.random.default_rng(0).permutation(ROWS)
    np.testing.assert_array_equal(respond(pick(order)).tokens, unstopped().tokens[order])
    few = np.array([4, 2, 0])
    np.testing.assert_array_equal(respond(pick(few)).tokens, unstopped().tokens[few])


def test_neighbours_do_not_matter():
    # The embedding of token 31 is NaN. In one run, the prompts of rows 1 to 7 consist of it.
    model = PARAMS | {"embed_tokens": PARAMS["embed_tokens"].at[31].set(np.nan)}
    head = tiny_model(num_hidden_layers=2, tie_word_embeddings=False)
    poisoned = model | {"lm_head": PARAMS["embed_tokens"].at[31].set(0)}
    tokens = np.where(PROMPTS.tokens == 31, 0, PROMPTS.tokens)
    clean = dataclasses.replace(FULL, tokens=tokens)
    others = tokens.copy()
    others[1:] = 31
    beside = dataclasses.replace(clean, tokens=others)

    @jax.jit
    def run(prompts):
        sampling = Sampling.of((), ROOM, 3)
        return generate(head, poisoned, prompts, sampling, jnp.int32(0), max_tokens=ROOM)

    alone, among = run(clean), run(beside)
    assert 31 not in alone.tokens[0]
    # A response ends where no token can be sampled.
    assert not among.mask[1:].any() and not among.finished.any()
    np.testing.assert_array_equal(among.tokens[0], alone.tokens[0])
    np.testing.assert_allclose(among.logprob[0], alone.logprob[0], rtol=1e-5)


def test_seed_and_sample_id_change_the_response():
    same = {"tokens": np.tile(PROMPTS.tokens[:1], (ROWS, 1)), "length": np.full(ROWS, 5, np.int32)}
    ids = np.array([1, 1, 2, 3, 4, 5, 6, 7], np.int32)
    prompts = dataclasses.replace(PROMPTS, **same, sample_id=ids)
    first, other = respond(prompts).tokens, respond(prompts, seed=4).tokens
    assert len(np.unique(first, axis=0)) == 7 and (first[0] == first[1]).all()
    assert (first != other).any(axis=1).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_captured_logprobs_equal_scoring_the_result(temperature):
    stop = (int(unstopped().tokens[0, 2]), int(unstopped().tokens[4, 1]))
    rollout = respond(stop=stop, temperature=temperature)
    assert rollout.finished.any()
    for captured, at in ((rollout.logprob, temperature), (rollout.model_logprob, 1.0)):
        scored = scores(PARAMS, rollout, at).logprob
        assert np.abs(captured - scored)[rollout.mask].max() < 5e-5


def test_greedy_is_the_models_own_best():
    rollout = respond(FULL, temperature=0.0)
    decoder = MODEL.bind(PARAMS)

    @jax.jit
    def best(sequence):
        slots = jnp.tile(jnp.arange(sequence.shape[1], dtype=jnp.int32)[None], (ROWS, 1))
        hidden = decoder(sequence, slots, jnp.ones(sequence.shape, jnp.int32))
        return jnp.einsum("bsd,vd->bsv", hidden, decoder.head).argmax(-1)

    sequence = np.zeros((ROWS, WIDTH + ROOM), np.int32)
    for i, length in enumerate(FULL.length):  # No gaps: padding is at the end only.
        sequence[i, :length] = FULL.tokens[i, :length]
        sequence[i, length : length + ROOM] = rollout.tokens[i]
    predicted = np.asarray(best(sequence))
    for i, length in enumerate(FULL.length):
        np.testing.assert_array_equal(
            rollout.tokens[i], predicted[i, length - 1 : length - 1 + ROOM]
        )


def test_knobs_compile_nothing():
    cases = [
        Sampling.of(stop, limit, seed, **knobs)
        for stop, limit, seed, knobs in [
            ((), ROOM, 0, {}),
            ((4, 9, 11), ROOM, 0, {"temperature": 0.5}),
            ((1,), 2, 1, {"top_p": 0.5}),
            ((), 3, 2**32 - 1, {"top_k": 4, "min_p": 0.1}),
            ((), ROOM, 0, {"temperature": 0.0}),
        ]
    ]
    run(PARAMS, PROMPTS, cases[0])
    counter = CompileCounter()
    drawn = [np.asarray(run(PARAMS, PROMPTS, case).tokens) for case in cases]
    assert counter.count == 0
    assert all((drawn[0] != other).any() for other in drawn[1:])


def test_eight_devices_draw_what_one_draws():
    mesh = make_mesh(MeshConfig(data=8))
    stop = (int(unstopped().tokens[0, 2]),)
    prompts, params = shard_rows(mesh, PROMPTS), replicate(mesh, PARAMS)
    rollout = jax.jit(
        lambda p, x, s: generate(MODEL, p, x, s, jnp.int32(4), max_tokens=ROOM, mesh=mesh)
    )(params, prompts, Sampling.of(stop, ROOM, 3, top_p=0.95))
    wanted = respond(stop=stop, top_p=0.95)
    assert not rollout.tokens.sharding.is_fully_replicated
    np.testing.assert_array_equal(rollout.tokens, wanted.tokens)
    np.testing.assert_array_equal(rollout.mask, wanted.mask)
    np.testing.assert_allclose(rollout.logprob, wanted.logprob, rtol=1e-5, atol=1e-6)


def test_a_row_that_pads_the_head_is_never_drawn():
    padded = dataclasses.replace(MODEL, vocab_size=40, valid=MODEL.vocab_size)
    # Padding ids have by far the largest logits.
    rows = 50 * PARAMS["embed_tokens"][:8]
    wide = PARAMS | {"embed_tokens": jnp.concatenate([PARAMS["embed_tokens"], rows])}
    for knobs in ({}, {"temperature": 0.0}, {"top_p": 0.9}):
        sampling = Sampling.of((), ROOM, 3, **knobs)
        rollout = jax.jit(lambda p, s: generate(padded, p, PROMPTS, s, jnp.int32(4),
                                                max_tokens=ROOM))(wide, sampling)  # fmt: skip
        wanted = respond(**knobs)
        np.testing.assert_array_equal(rollout.tokens, wanted.tokens)
        np.testing.assert_allclose(rollout.logprob, wanted.logprob, atol=1e-5)
        np.testing.assert_allclose(rollout.model_logprob, wanted.model_logprob, atol=1e-5)


def test_softcapped_logits_are_drawn_as_they_are_scored():
    capped = dataclasses.replace(
        MODEL, config=dataclasses.replace(MODEL.config, final_logit_softcapping=0.5)
    )
    sampling = Sampling.of((), ROOM, 3)
    rollout = jax.jit(lambda p: generate(capped, p, PROMPTS, sampling, jnp.int32(4),
                                         max_tokens=ROOM))(PARAMS)  # fmt: skip
    stats = jax.jit(functools.partial(response_stats, capped))(
        PARAMS, PROMPTS.tokens, PROMPTS.length, rollout.tokens, rollout.mask
    )
    assert (np.abs(rollout.model_logprob - respond().model_logprob)[REAL] > 1e-3).any()
    np.testing.assert_allclose(rollout.model_logprob[REAL], stats.logprob[REAL], atol=1e-5)
