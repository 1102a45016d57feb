"""Rows in flight: each response is learned from once, and is the one that it would have been."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.metrics import results
from fireopd_jax.rollout.engine import generate
from fireopd_jax.rollout.overprovision import generate_overprovisioned, nothing_carried
from fireopd_jax.rollout.sampling import Sampling
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate, shard_rows
from tests.cases import make_prompts, random_params, tiny_model

ROWS, EXTRA, WIDTH, ROOM, STEPS = 8, 4, 5, 12, 5
MODEL = tiny_model(vocab_size=12, num_hidden_layers=2)
PARAMS = random_params(MODEL)
OTHER = random_params(MODEL, seed=1)
SAMPLING = Sampling.of((0, 1), ROOM, 3, entropy=True)


def asked(step, rows=ROWS, **fields):
    rng = np.random.default_rng(step)
    ids = 100 * (step + 1) + np.arange(rows)
    prompts = make_prompts(rng.integers(1, WIDTH + 1, rows), WIDTH, sample_id=ids, seed=step)
    return dataclasses.replace(prompts, **fields)


def drawn(
    steps=STEPS, extra=EXTRA, params=lambda step: PARAMS, mesh=None, prompts=asked, **options
):
    """Return the rollout, the rows in flight and the metrics of each of some steps."""

    @jax.jit
    def step_of(params, prompts, carried, version):
        return generate_overprovisioned(
            MODEL,
            params,
            prompts,
            carried,
            SAMPLING,
            version,
            max_tokens=ROOM,
            mesh=mesh,
            **options,
        )

    carried, out = nothing_carried(prompts(0, extra), ROOM), []
    for step in range(steps):
        new, own, version = prompts(step), params(step), jnp.int32(step)
        if mesh is not None:
            new, carried = shard_rows(mesh, new), shard_rows(mesh, carried)
            own, version = replicate(mesh, own), replicate(mesh, version)
        rollout, carried, metrics = step_of(own, new, carried, version)
        out.append(jax.device_get((rollout, carried, results(metrics))))
    return out


@jax.jit
def whole(params, prompts):
    return generate(MODEL, params, prompts, SAMPLING, jnp.int32(0), max_tokens=ROOM)


def responses(rollout):
    """Return by sample id the tokens, log-probabilities and end of each real row."""
    return {
        int(rollout.prompts.sample_id[i]): (
            rollout.tokens[i][rollout.mask[i]].tolist(),
            rollout.logprob[i][rollout.mask[i]],
            rollout.policy.entropy[i][rollout.mask[i]],
            bool(rollout.finished[i]),
        )
        for i in np.flatnonzero(rollout.prompts.length)
    }


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("slots", [None, 2])
def test_every_response_is_learned_from_once_and_is_that_of_a_whole_rollout(devices, slots):
    mesh = None if devices == 1 else make_mesh(MeshConfig(data=devices))
    steps = drawn(mesh=mesh, slots=slots)
    wanted = {}
    for step in range(STEPS):
        wanted |= responses(jax.device_get(whole(PARAMS, asked(step))))
    found, lengths = {}, [len(each[0]) for each in wanted.values()]
    assert len(set(lengths)) > 1 and max(lengths) == ROOM
    for rollout, _, _ in steps:
        own = responses(rollout)
        assert not set(own) & set(found)
        found |= own
    left = responses(steps[-1][1].rows)
    assert set(found) | set(left) == set(wanted) and len(left) == len(wanted) - len(found)
    for id, (tokens, logprob, entropy, finished) in found.items():
        assert (tokens, finished) == (wanted[id][0], wanted[id][3])
        np.testing.assert_allclose(logprob, wanted[id][1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entropy, wanted[id][2], rtol=1e-4, atol=1e-5)
    for id, (tokens, *_) in left.items():
        assert tokens == wanted[id][0][: len(tokens)]


def test_a_step_has_its_rows_as_soon_as_all_but_the_extra_ones_have_ended():
    steps, before = drawn(), 0
    for rollout, carried, values in steps:
        real, flying = (x.prompts.length > 0 for x in (rollout, carried.rows))
        assert real.sum() + flying.sum() == ROWS + before
        assert (flying & ~carried.ended).sum() <= EXTRA
        ended = rollout.finished | (rollout.mask.sum(axis=1) == ROOM)
        assert (ended == real).all()
        assert values["rollout/learned_rows"] == real.sum()
        assert values["rollout/unfinished_rows"] == (flying & ~carried.ended).sum()
        before = flying.sum()
    assert len(steps[0][0].tokens) == ROWS and (steps[0][0].prompts.length > 0).sum() < ROWS
    assert all((each[0].prompts.length > 0).sum() >= ROWS - EXTRA for each in steps)


def test_a_response_goes_on_with_the_parameters_of_each_step():
    steps = drawn(params=lambda step: PARAMS if step == 0 else OTHER)
    first = responses(jax.device_get(whole(PARAMS, asked(0))))
    seen = 0
    for rollout, _, values in steps[1:]:
        for i in np.flatnonzero(rollout.prompts.sample_id < 200):
            mask, version = rollout.mask[i], rollout.version[i]
            if not mask.any() or rollout.prompts.length[i] == 0:
                continue
            own = version[mask]
            assert (np.diff(own) >= 0).all()
            old = int((own == 0).sum())
            assert (
                rollout.tokens[i, :old].tolist()
                == first[int(rollout.prompts.sample_id[i])][0][:old]
            )
            seen += 0 < old < mask.sum()
            assert (
                values["rollout/updates_behind_max"] >= 1 and values["rollout/stale_fraction"] > 0
            )
    assert seen
    assert steps[0][2]["rollout/stale_fraction"] == 0


def test_without_extra_rows_it_is_the_whole_rollout():
    for step, (rollout, carried, values) in enumerate(drawn(steps=2, extra=0)):
        plain = jax.device_get(whole(PARAMS, asked(step)))
        np.testing.assert_array_equal(rollout.tokens, plain.tokens)
        np.testing.assert_array_equal(rollout.mask, plain.mask)
        assert len(carried.ended) == 0 and values["rollout/unfinished_rows"] == 0


def test_rows_of_one_prompt_that_end_together_are_a_group():
    def prompts(step, rows=ROWS):
        own = asked(step, rows)
        half = np.arange(rows) // 2
        return dataclasses.replace(
            own,
            tokens=own.tokens[2 * half],
            length=own.length[2 * half],
            group=half.astype(np.int32),
        )

    pairs = 0
    for rollout, *_ in drawn(prompts=prompts, group_size=2):
        ids, group = rollout.prompts.sample_id // 2, rollout.prompts.group
        real = np.flatnonzero(rollout.prompts.length)
        for i in real:
            assert group[i] == min(j for j in real if ids[j] == ids[i])
            pairs += int((ids[real] == ids[i]).sum() == 2)
        empty = np.flatnonzero(rollout.prompts.length == 0)
        assert len(set(group[empty]) | set(group[real])) == len(empty) + len(set(ids[real]))
    assert pairs


def test_empty_prompts_are_never_carried():
    def prompts(step, rows=ROWS):
        own = asked(step, rows)
        return dataclasses.replace(own, length=np.where(np.arange(rows) % 3 == 1, 0, own.length))

    steps = drawn(prompts=prompts)
    assert all(not rollout.mask[rollout.prompts.length == 0].any() for rollout, *_ in steps)
    ids = [id for rollout, *_ in steps for id in responses(rollout)]
    assert len(ids) == len(set(ids)) and len(ids) >= STEPS * 5 - EXTRA
