"""The engine on the host: the same responses for any schedule, and every way a response ends.

`generate`, which samples all rows in one batch, is the reference. An engine with few slots, a short
request table and small chunks of steps must return the same responses.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.requests import Budget, Knobs, Request
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate
from tests.cases import make_prompts, random_params, tiny_model

WIDTH, ROOM, ROWS = 20, 24, 14
MODEL = tiny_model(num_hidden_layers=2)
PARAMS = random_params(MODEL)
LENGTHS = np.random.default_rng(1).integers(1, WIDTH + 1, ROWS)
LENGTHS[:2] = WIDTH, 1
PROMPTS = make_prompts(LENGTHS, WIDTH, sample_id=np.arange(ROWS) + 5)
STOP = (3, 17)


def requests(**knobs):
    settings = Knobs(**{"stop": STOP, "max_tokens": ROOM} | knobs)
    return [
        Request(int(PROMPTS.sample_id[i]), PROMPTS.tokens[i, : LENGTHS[i]], settings)
        for i in range(ROWS)
    ]


@functools.cache
def reference():
    sampling = Sampling.of(STOP, ROOM, 3)
    drawn = jax.jit(lambda p: generate(MODEL, p, PROMPTS, sampling, jnp.int32(7), max_tokens=ROOM))(
        PARAMS
    )
    return jax.device_get(drawn)


def engine(model=MODEL, params=PARAMS, **settings):
    settings = {"width": WIDTH, "room": ROOM, "seed": 3, "slots": 3, "rows": 6} | settings
    made = Engine(model, **settings)
    made.load(params, version=7)
    return made


@pytest.fixture(scope="module")
def plain():
    return engine(chunk_steps=7, text=lambda ids: "".join(chr(97 + i) for i in ids))


def check(completions, rows=range(ROWS)):
    wanted = reference()
    assert len(completions) == len(rows)
    for i, got in zip(rows, completions, strict=True):
        length = wanted.mask[i].sum()
        assert got.id == PROMPTS.sample_id[i]
        np.testing.assert_array_equal(got.tokens, wanted.tokens[i, :length])
        np.testing.assert_allclose(got.logprobs, wanted.logprob[i, :length], atol=2e-5)
        np.testing.assert_allclose(got.model_logprobs, wanted.model_logprob[i, :length], atol=2e-5)
        assert (got.versions == 7).all()
        assert got.finish == ("stop" if wanted.finished[i] else "length")


def test_the_reference_has_both_ends_and_many_lengths():
    drawn = reference()
    assert 2 < drawn.finished.sum() < ROWS - 2
    assert len(set(drawn.mask.sum(axis=1))) > 4


def test_a_few_slots_draw_what_one_batch_draws(plain):
    check(plain.generate(requests()))
    assert plain.statistics.slot_use > 0.7
    assert plain.statistics.drawn == reference().mask.sum()
    assert plain.statistics.prefilled == (LENGTHS - 1).sum()


def test_the_order_of_the_queue_changes_nothing(plain):
    backwards = plain.generate(requests()[::-1])
    check(backwards[::-1])


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({"slots": 1, "chunk_steps": 1000}, False),
        ({"slots": 16, "rows": None}, False),
        ({"memory": Paged(page_size=8), "slots": 4}, False),
        # A pool too small for four long rows: they wait, are preempted, and continue.
        ({"memory": Paged(page_size=8, tokens=64), "slots": 4, "rows": 14}, True),
    ],
    ids=["one slot", "more slots than rows", "paged", "a small pool"],
)
def test_slots_chunks_and_layout_change_nothing(settings, preempts):
    made = engine(**settings)
    check(made.generate(requests()))
    assert (made.statistics.preempted > 0) == preempts
    assert made.statistics.drawn == reference().mask.sum()


@pytest.mark.slow
def test_eight_replicas_draw_what_one_draws():
    mesh = make_mesh(MeshConfig(data=8))
    made = engine(params=replicate(mesh, PARAMS), slots=2, rows=2, mesh=mesh)
    check(made.generate(requests()))


def test_eight_bit_keys_and_values_stay_close():
    exact = {c.id: c for c in engine().generate(requests(temperature=0.0))}
    errors = []
    for got in engine(memory=Dense(dtype="int8")).generate(requests(temperature=0.0)):
        wanted = exact[got.id]
        same = min(len(got.tokens), len(wanted.tokens))
        split = np.flatnonzero(got.tokens[:same] != wanted.tokens[:same])
        same = split[0] if len(split) else same
        errors.extend(np.abs(got.logprobs[:same] - wanted.logprobs[:same]))
    assert len(errors) > 40 and 0 < np.mean(errors) < 0.02, np.mean(errors)


def test_rows_of_one_prompt_share_its_prefill(plain):
    before = plain.statistics.prefilled
    prompt = PROMPTS.tokens[0, :WIDTH]
    group = [Request(i, prompt, Knobs(max_tokens=3, temperature=4.0)) for i in range(5)]
    drawn = plain.generate(group)
    # The table has six rows, so all five are in the queue together.
    assert plain.statistics.prefilled - before == WIDTH - 1
    assert len({tuple(c.tokens) for c in drawn}) > 2


def test_ten_lengths_of_prompts_compile_one_program_at_the_start(plain):
    counter = CompileCounter()
    lengths = range(1, 11)
    drawn = plain.generate(
        [Request(n, PROMPTS.tokens[0, :n], Knobs(max_tokens=n, top_p=0.9)) for n in lengths]
    )
    assert [len(c.tokens) for c in drawn] == list(lengths)
    assert counter.count == 0 and plain.programs == 1


@pytest.mark.slow
def test_a_long_cache_grows_through_three_programs_that_are_there_from_the_start():
    made = engine(width=8, room=1100, chunk_steps=64)
    assert made.programs == 3 and made.capacity == made.capacities[0] < 300
    short = made.generate([Request(1, PROMPTS.tokens[0, :5], Knobs(max_tokens=100))])
    counter = CompileCounter()
    assert made.capacity == made.capacities[0]
    long = made.generate([Request(1, PROMPTS.tokens[0, :5], Knobs(max_tokens=700))])
    assert made.capacity == made.capacities[2] and counter.count <= 2  # growing, twice
    np.testing.assert_array_equal(long[0].tokens[:100], short[0].tokens)
    assert len(long[0].tokens) == 700


def test_pieces_of_a_budget_are_one_run(plain):
    done, left, pieces = {}, requests(), 0
    while left:
        pieces += 1
        drawn = plain.generate(left, Budget(tokens=40))
        assert (
            sum(len(c.tokens) for c in drawn) - sum(len(r.begun.tokens) for r in left if r.begun)
            <= 40
        )
        done |= {c.id: c for c in drawn if c.finish != "budget"}
        begun = {c.id: c for c in drawn if c.finish == "budget"}
        left = [dataclasses.replace(r, begun=begun[r.id]) for r in left if r.id in begun]
    assert pieces > 3
    check([done[int(i)] for i in PROMPTS.sample_id])


def test_a_budget_of_no_time_draws_nothing_and_loses_nothing(plain):
    drawn = plain.generate(requests(), Budget(seconds=0.0))
    assert {c.finish for c in drawn} == {"budget"} and not any(len(c.tokens) for c in drawn)
    check(plain.generate(requests()))


def test_other_parameters_are_recorded_from_where_they_drew(plain):
    first = plain.generate(requests()[:1], Budget(tokens=9))[0]
    assert first.finish == "budget" and 0 < len(first.tokens) <= 9
    plain.load(PARAMS, version=8)
    rest = plain.generate([dataclasses.replace(requests()[0], begun=first)])[0]
    plain.load(PARAMS, version=7)
    n = len(first.tokens)
    assert (rest.versions[:n] == 7).all() and (rest.versions[n:] == 8).all()
    np.testing.assert_array_equal(rest.tokens, reference().tokens[0][reference().mask[0]])


def test_longest_first_starts_with_those(plain):
    guesses = [0, 9, 0, 50, 0]
    asked = [
        dataclasses.replace(request, expected=guess)
        for request, guess in zip(requests(max_tokens=1), guesses, strict=False)
    ]
    order = [c.id - 5 for c in plain.stream(asked)]
    assert order[:2] == [3, 1] or set(order[:3]) >= {3, 1}


def test_every_request_has_its_own_knobs(plain):
    mixed = [
        dataclasses.replace(r, knobs=dataclasses.replace(r.knobs, temperature=t))
        for r, t in zip(requests(), [1.0, 0.0] * 7, strict=True)
    ]
    drawn = plain.generate(mixed)
    check(drawn[::2], range(0, ROWS, 2))
    greedy = plain.generate(requests(temperature=0.0))
    for one, other in zip(drawn[1::2], greedy[1::2], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_stop_string_ends_a_response_whatever_the_chunk(plain):
    text = "".join(chr(97 + i) for i in reference().tokens[0])
    assert reference().mask[0].sum() > 8
    asked = requests(stop_strings=(text[3:5], "never"))
    drawn = plain.generate(asked)
    assert drawn[0].finish == "stop" and len(drawn[0].tokens) <= 5
    other = engine(chunk_steps=2, text=plain.text).generate(asked)
    for one, two in zip(drawn, other, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        assert one.finish == two.finish
    # Rows without a stop string do not change, and cancelled slots are used again.
    untouched = [i for i, c in enumerate(drawn) if len(c.tokens) == reference().mask[i].sum()]
    assert untouched
    check(plain.generate(requests()))


def test_min_tokens_keeps_the_stop_tokens_away(plain):
    drawn = plain.generate(requests(min_tokens=6))
    assert min(len(c.tokens) for c in drawn) >= 6
    assert not any(set(c.tokens[:6]) & set(STOP) for c in drawn)


def test_logits_that_are_not_finite_end_their_row_alone(plain):
    # The embedding of token 31 is NaN; only the request `poison` contains it.
    head = tiny_model(num_hidden_layers=2, tie_word_embeddings=False)
    params = PARAMS | {
        "embed_tokens": PARAMS["embed_tokens"].at[31].set(np.nan),
        "lm_head": PARAMS["embed_tokens"].at[31].set(0.0),
    }
    tokens = np.where(PROMPTS.tokens == 31, 0, PROMPTS.tokens)
    knobs = Knobs(max_tokens=6, min_tokens=6, stop=(31,))  # so that it is never sampled
    clean = [Request(i, tokens[i, : LENGTHS[i]], knobs) for i in range(5)]
    poison = Request(9, np.array([1, 31, 2], np.int32), knobs)
    made = engine(head, params, slots=1)
    alone = made.generate(clean)
    among = made.generate([poison, *clean])  # The others use its slot afterwards.
    assert among[0].finish == "not_finite" and not len(among[0].tokens)
    assert made.statistics.not_finite == 1
    for one, two in zip(alone, among[1:], strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        assert np.isfinite(two.logprobs).all()


def test_a_prompt_too_long_is_said_and_not_cut(plain):
    long = Request(77, np.ones(WIDTH + 1, np.int32), Knobs(max_tokens=2))
    drawn = plain.generate([long, *requests()])
    assert drawn[0].finish == "overlong" and not len(drawn[0].tokens)
    check(drawn[1:])


class Trickle:
    """Feeds the requests one by one; those of `gone` are abandoned after they have begun."""

    def __init__(self, rows, gone=()):
        self.left, self.gone, self.given = list(rows), set(gone), []

    def arriving(self):
        new, self.left = self.left[:1], self.left[1:]
        self.given += [request.id for request in new]
        return new

    def abandoned(self):
        return self.gone & set(self.given[:-1])


def test_requests_that_arrive_later_draw_what_they_draw_alone():
    made = engine(chunk_steps=2)
    order = {request.id: i for i, request in enumerate(requests())}
    drawn = sorted(made.stream([], feed=Trickle(requests())), key=lambda c: order[c.id])
    check(drawn)
    assert made.statistics.slot_use > 0.4  # they joined those that were running


def test_abandoned_requests_are_not_answered_and_disturb_no_other():
    made = engine(chunk_steps=1)
    lengths = reference().mask.sum(axis=1)
    gone = [i for i in range(ROWS) if lengths[i] > 4][::2]
    feed = Trickle(requests(), {int(PROMPTS.sample_id[i]) for i in gone})
    drawn = {c.id: c for c in made.stream([], feed=feed)}
    rest = [i for i in range(ROWS) if i not in gone]
    check([drawn.pop(int(PROMPTS.sample_id[i])) for i in rest], rest)
    assert gone and not drawn
    check(made.generate(requests()))


@pytest.mark.slow
def test_a_context_limits_prompt_and_response_together():
    made = engine(width=30, room=30, context=30)
    assert made.capacities[-1] < 60
    prompt = PROMPTS.tokens[0, :10]
    asked = [Request(i, prompt, Knobs(max_tokens=20 + i)) for i in range(2)]
    first, second = made.generate(asked)
    assert len(first.tokens) == 20 and first.finish == "length"
    assert second.finish == "overlong" and not len(second.tokens)
    alone = engine(width=30, room=30).generate(asked)
    np.testing.assert_array_equal(first.tokens, alone[0].tokens)


def test_an_empty_list_is_answered_by_none(plain):
    assert plain.generate([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(4, np.zeros(0, np.int32)), "request 4: the prompt is empty"),
        (Request(4, np.array([32], np.int32)), "token id 32, expected ids from 0 to 31"),
        (Request(4, np.ones(1, np.int32), Knobs(stop=(99,))), "stop token 99 is outside"),
        (Request(4, np.ones(1, np.int32), Knobs(stop=tuple(range(9)))), "9 stop tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(plain, request_, message):
    with pytest.raises(UserError, match=message):
        plain.generate([request_])


def test_a_pool_too_small_for_one_response_is_refused():
    with pytest.raises(UserError, match=r"rollout\.cache\.tokens=32: .* may need 48 tokens; .* 64"):
        engine(memory=Paged(page_size=8, tokens=32))


def test_partial_responses_grow_to_those_that_are_drawn(plain):
    sampler = engine(slots=3, chunk_steps=2)
    whole = {each.id: each.tokens.tolist() for each in plain.generate(requests())}
    last = {}
    for each in sampler.stream(requests(), partial=True):
        tokens = each.tokens.tolist()
        assert tokens[: len(last.get(each.id, []))] == last.get(each.id, [])
        last[each.id] = tokens
        if each.finish != "running":
            assert tokens == whole[each.id]
    assert last == whole


def test_an_engine_that_is_fitted_compiles_what_it_needs_and_draws_the_same():
    made = Engine(MODEL, width=8, room=1100, seed=3, slots=3, rows=6)
    made.load(PARAMS, compiled=False)
    assert made.programs == 0
    request = Request(1, PROMPTS.tokens[0, :5], Knobs(max_tokens=60))
    made.fit(500)
    assert made.programs == 1 and made.capacity == made.capacities[1]
    (large,) = made.generate([request])
    made.fit(100)
    assert made.programs == 2 and made.capacity == made.capacities[0]
    (small,) = made.generate([request])
    np.testing.assert_array_equal(large.tokens, small.tokens)
    made.fit(2000)
    assert made.capacity == made.capacities[-1]
