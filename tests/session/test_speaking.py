"""Continuations by teachers on the mesh: of prompt and prefix, a function of the sample alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.rollout.engine import generate
from fireopd_jax.session.host import Policies
from fireopd_jax.session.session import Session
from fireopd_jax.session.setup import set_up
from fireopd_jax.session.speaking import Ask, Continue, ResidentSpeaker
from fireopd_jax.sharding.mesh import replicate
from fireopd_jax.text.chat import decode
from fireopd_jax.types import Prompts
from tests.cases import random_params

ROWS, ROOM, EACH, N, SIZE = 8, 16, 2, 3, 5
TINY = ("{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
        "head_dim: 8, intermediate_size: 24}")  # fmt: skip
SETTINGS = ["method/omniopd", "eval.problems=0", f"rollout.batch_size={ROWS}",
            f"student.architecture={TINY}", "rollout.group_size=1",
            f"rollout.max_tokens={ROOM}", "data.max_prompt_tokens=9"]  # fmt: skip
GREEDY = 1e-4
"""A temperature at which the most probable token is always drawn."""


def make_setup(tmp_path, mesh, teachers):
    names = [f"t{i}" for i in range(teachers)]
    rows = [f'{{"prompt": "{i}", "teacher": "{names[i % teachers]}"}}\n' for i in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows))
    several = [f"teachers.{name}.architecture={TINY}" for name in names]
    return set_up(load_config([*SETTINGS, f"data.path={file}", "data.teacher_column=teacher",
                               *several, f"mesh.data={mesh}"]))  # fmt: skip


def make_session(setup):
    """Return a session without a folder."""
    session = object.__new__(Session)
    session.setup, session.generators = setup, {}
    return session


def make_case(tmp_path, mesh=1, teachers=1, temperature=1.0):
    setup = make_setup(tmp_path, mesh, teachers)
    session = make_session(setup)
    how = Continue(N, SIZE, temperature)
    params = [
        replicate(setup.mesh, jax.tree.map(lambda leaf: 2 * leaf, random_params(spec.model, i)))
        for i, spec in enumerate(setup.teachers)
    ]
    policies = Policies({}, params, np.zeros((), np.int32))
    return setup, ResidentSpeaker(session, setup.config.method, how), policies


def make_prompts(teachers=1):
    rng = np.random.default_rng(0)
    index = np.arange(ROWS, dtype=np.int32)
    ids = rng.integers(48, 58, (ROWS, 9)).astype(np.int32)
    length = rng.integers(3, 10, ROWS).astype(np.int32)
    ones = np.ones((ROWS, 1), np.int32)
    return Prompts(
        ones, ones[:, 0], ids, length, index % teachers, index, 100 + 7 * index, index
    )  # the student's own prompt is not what a teacher continues


def make_asks(seed=1):
    """Two prefixes a row, by ascending length: none for row 3, one for row 5, an empty one."""
    rng, asks = np.random.default_rng(seed), []
    for row in range(ROWS):
        sizes = sorted(rng.choice(ROOM - SIZE, 2, replace=False).tolist())
        if row == 0:
            sizes[0] = 0
        asks += [Ask(row, rng.integers(48, 58, size).tolist()) for size in sizes]
    asks[6] = asks[7] = asks[11] = None
    return asks


@pytest.mark.parametrize("mesh, teachers", [pytest.param(1, 1, marks=pytest.mark.slow), (8, 2)])
def test_each_prefix_is_continued_by_the_teacher_of_its_row(mesh, teachers, tmp_path):
    setup, speak, policies = make_case(tmp_path, mesh, teachers, GREEDY)
    prompts, asks = make_prompts(teachers), make_asks()
    found = speak(prompts, asks, policies)
    assert [len(texts) for texts in found] == [0 if ask is None else N for ask in asks]
    # The engine, called directly with prompt and prefix, one row at a time.
    sampling = setup.sampling("audit", temperature=GREEDY, max_tokens=SIZE)
    draws = [
        jax.jit(lambda p, q, spec=spec: generate(spec.model, p, q, sampling, jnp.int32(0),
                                                 max_tokens=SIZE))
        for spec in setup.teachers
    ]  # fmt: skip
    seen = set()
    for ask, texts in zip(asks, found, strict=True):
        if ask is None:
            continue
        context = prompts.teacher_tokens[ask.row][: prompts.teacher_length[ask.row]]
        ids = [*context.tolist(), *ask.prefix]
        padded = np.zeros((1, 9 + ROOM), np.int32)
        padded[0, : len(ids)] = ids
        one = np.zeros(1, np.int32)
        alone = Prompts(padded, one + len(ids), padded, one + 1, one, one, one, one)
        route = int(prompts.teacher[ask.row])
        whole = jax.device_put(policies.teachers[route], jax.devices()[0])
        drawn = jax.device_get(draws[route](whole, alone))
        text = decode(setup.student.tokenizer, drawn.tokens[0][drawn.mask[0]].tolist())
        assert texts == [text] * N
        seen.add(text)
    assert len(seen) > 5, "texts differ with their prefixes"


def test_samples_differ_and_are_a_function_of_the_sample_not_of_its_place(tmp_path):
    _, speak, policies = make_case(tmp_path)
    prompts, asks = make_prompts(), make_asks()
    found = speak(prompts, asks, policies)
    assert sum(len(set(texts)) > 1 for texts in found if texts) > 8
    order = np.random.default_rng(2).permutation(ROWS)
    turned = jax.tree.map(lambda leaf: leaf[order], prompts)
    theirs = [
        ask and dataclasses.replace(ask, row=place)
        for place, row in enumerate(order.tolist())
        for ask in asks[row * EACH : (row + 1) * EACH]
    ]
    again = speak(turned, theirs, policies)
    for place, row in enumerate(order.tolist()):
        ours = found[row * EACH : (row + 1) * EACH]
        assert again[place * EACH : (place + 1) * EACH] == ours
    # Other asks in the batch change nothing; another sample of the same prefix does.
    fewer = [ask if i == 8 else None for i, ask in enumerate(asks)]
    assert speak(prompts, fewer, policies)[8] == found[8]
    other = dataclasses.replace(prompts, sample_id=prompts.sample_id + np.int32(1))
    assert speak(other, fewer, policies)[8] != found[8]


def test_responses_may_take_all_positions_of_a_teacher(tmp_path):
    """A chunk ends where the response does: no more positions are needed than for the response."""
    settings = [f"rollout.max_tokens={ROOM}", "data.max_prompt_tokens=9"]
    bounded = TINY.replace("}", f", max_position_embeddings: {9 + ROOM}}}")
    setup = set_up(load_config([*SETTINGS, *settings, f"teacher.architecture={bounded}",
                                "data.path=builtin:addition-1", "mesh.data=1"]))  # fmt: skip
    session = make_session(setup)
    speak = ResidentSpeaker(session, setup.config.method, Continue(1, SIZE))
    params = replicate(setup.mesh, random_params(setup.teachers[0].model))
    asks = [Ask(row, [50] * (ROOM - SIZE)) for row in range(ROWS)]
    found = speak(make_prompts(), asks, Policies({}, [params], np.zeros((), np.int32)))
    assert [len(texts) for texts in found] == [1] * ROWS
