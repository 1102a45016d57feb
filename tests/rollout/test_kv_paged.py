"""The page allocator: no page is lost or owned twice, and groups share full pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.state import Shape
from fireopd_jax.rollout.streaming import Engine
from tests.cases import random_params, tiny_model

MODEL = tiny_model()
PARAMS = random_params(MODEL)
PAGE = 8


class Checked(Engine):
    """An engine that checks its pages after every few steps."""

    looks = 0
    shared = 0
    least_free = 10**6

    def _advance(self, running, steps):
        out = super()._advance(running, steps)
        state = jax.tree.map(lambda x: np.asarray(x)[0], self._state)
        cache, slots = state.cache, state.slots
        none, top = len(cache.free), int(cache.top)
        free = cache.free[:top]
        assert len(set(free)) == top  # No page is in the free stack twice.
        held = [set(row[row < none]) for row in cache.tables[slots.active]]
        entries = cache.entry_tables[state.entries.left > 0]
        alive = set().union(*held, set(entries[entries < none]))
        assert not alive & set(free)
        for row, position in zip(
            cache.tables[slots.active], slots.position[slots.active], strict=True
        ):
            written = row[: -(-position // PAGE)]
            assert (written < none).all() and len(set(written)) == len(written)
        # Two slots share only full pages of one prompt.
        tables, positions = cache.tables[slots.active], slots.position[slots.active]
        rows = slots.row[slots.active]
        for i in range(len(tables)):
            for j in range(i):
                common = (set(tables[i]) & set(tables[j])) - {none}
                if common:
                    prompts = state.requests.prompt[rows[[i, j]]]
                    assert (prompts[0] == prompts[1]).all()
                    assert len(common) <= state.requests.length[rows[i]] // PAGE
                    assert positions.min() >= 0
                    self.shared += 1
        self.looks += 1
        self.least_free = min(self.least_free, top)
        return out


def ask(count, group=1, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(0, count, group):
        prompt = rng.integers(0, 32, rng.integers(1, 30)).astype(np.int32)
        limits = rng.integers(1, 40, group)
        made += [Request(i + j, prompt, Knobs(max_tokens=int(limits[j]))) for j in range(group)]
    return made


def engine(tokens, slots=6, rows=24):
    memory = Paged(page_size=PAGE, tokens=tokens)
    made = Checked(
        MODEL, width=30, room=40, seed=1, slots=slots, rows=rows, memory=memory, chunk_steps=3
    )
    made.load(PARAMS)
    return made


@pytest.mark.slow
def test_pages_are_conserved_and_groups_share_them():
    wide, narrow = engine(None), engine(14 * PAGE)
    asked = ask(24, group=4)
    wanted = wide.generate(asked)
    drawn = narrow.generate(asked)
    for one, other in zip(wanted, drawn, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert len(one.tokens) == asked[one.id].knobs.max_tokens
    assert narrow.looks > 20 and narrow.shared > 10 and wide.shared > 10
    statistics = narrow.statistics
    assert statistics.stalled > 0 and statistics.preempted > 0 and wide.statistics.preempted == 0
    assert narrow.least_free < 3


def test_a_slot_that_waits_for_a_page_is_the_youngest():
    memory = Paged(page_size=PAGE, tokens=12 * PAGE)
    state = memory.init(MODEL.config, Shape(3, 2, 8, 48, 48))
    state = dataclasses.replace(state, top=jnp.int32(1))
    active, position = jnp.ones(3, bool), jnp.zeros(3, jnp.int32)
    ready = memory.ready(state, position, active, jnp.array([5, 3, 4], jnp.int32))
    assert ready.tolist() == [False, True, False]
    after = memory.allocate_tokens(state, position, ready)
    assert int(after.top) == 0 and int(after.tables[1, 0]) == int(state.free[0])
    assert not memory.ready(after, position, active, jnp.arange(3, dtype=jnp.int32))[0]


def test_what_nobody_holds_is_freed_and_nothing_else():
    memory = Paged(page_size=PAGE, tokens=12 * PAGE)
    state = memory.allocate_prompts(
        memory.init(MODEL.config, Shape(3, 2, 8, 48, 48)), jnp.array([20, 9], jnp.int32)
    )
    assert int(state.top) == 12 - 3 - 2
    state = memory.insert(
        state,
        jnp.array([0, 0, 1], jnp.int32),
        jnp.array([2, 0, 3], jnp.int32),  # slot 3: no copy
        jnp.array([20, 20, 9], jnp.int32),
        8,
    )
    assert int(state.top) == 12 - 5 - 2  # two copies of the last, partial page
    tables = np.asarray(state.tables)
    assert (tables[2, :2] == tables[0, :2]).all() and tables[2, 2] != tables[0, 2]
    active = jnp.array([True, False, False])
    assert bool(memory.has_garbage(state, active, jnp.array([False, True])))
    freed = memory.reclaim(state, active, jnp.array([False, True]))
    kept = {*tables[0, :3].tolist(), *np.asarray(state.entry_tables)[1, :2].tolist()}
    assert set(np.asarray(freed.free)[: int(freed.top)].tolist()) == set(range(12)) - kept
    assert not bool(memory.has_garbage(freed, active, jnp.array([False, True])))
