"""Teachers over HTTP in the score and audit of a run: the same numbers as on this machine."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken

from fireopd_jax.bench.methods import random_rollout
from fireopd_jax.config import UserError
from fireopd_jax.data.pipeline import PromptLoader
from fireopd_jax.metrics import results
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.session.host import Policies
from fireopd_jax.session.parameters import load_or_make
from fireopd_jax.session.refining import host_stages
from fireopd_jax.session.served import Listener, ServedSpeaker, connections
from fireopd_jax.session.setup import set_up
from fireopd_jax.session.speaking import Ask, Continue
from fireopd_jax.sharding.mesh import replicate, replicated, shard_rows
from fireopd_jax.text.tokenizer import byte_tokenizer
from fireopd_jax.training.programs import make_programs
from tests.cases import make_session, random_params
from tests.remote.fake import EVERYTHING, Said, serving
from tests.serving import served
from tests.training.test_training import BASE

SMALL = [*BASE, "eval.problems=0", "optim.learning_rate=1e-2", "rollout.max_tokens=12"]
FILTER = "method.filter={kind: teacher_quantile, drop_fraction: 0.3}"
STUDENT = "method.score={kind: top_k, support: student, k: 8}"
METHODS = {
    "student": ["method/local_support", STUDENT, FILTER],
    "teacher": ["method/local_support", "method.score={kind: top_k, support: teacher, k: 8}"],
    "sampled": ["method/opd", FILTER, "mesh.data=8"],
}
ONE = jnp.float32(1)


def over(url, *settings, model="tiny", **keys):
    keys = {"url": url, "model": model, "backoff_s": 0.01} | keys
    written = ", ".join(f"{name}: {value}" for name, value in keys.items())
    return set_up(load_config([*SMALL, *settings, f"teachers.default.served={{{written}}}"]))


def session_of(setup, folder):
    session = make_session(setup)
    session.connections, session.log = None, Said()
    session.folder = types.SimpleNamespace(path=folder)  # pyright: ignore
    return session


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder with a model, and the URL at which it is served."""
    folder = served.write_folder(tmp_path_factory.mktemp("model") / "tiny")
    with served.server(folder) as (client, _):
        yield folder, f"{client.base_url}/v1".replace("//v1", "/v1")


def make_rollout(setup):
    """Random responses; row 1 has none."""
    rollout = jax.device_get(random_rollout(setup))
    mask = np.array(rollout.mask)
    mask[1] = False
    return shard_rows(setup.mesh, dataclasses.replace(rollout, mask=mask))


def student_of(setup):
    return replicate(setup.mesh, random_params(setup.student.model, 3))


def updated(setup, rollout, teachers):
    """Scored batch and metrics of one update, through the programs of a run."""
    method = setup.config.method
    programs, student = make_programs(setup, method, setup.config.optim), student_of(setup)
    state = programs.init(jax.tree.map(jnp.copy, student))
    scored = programs.score(student, teachers, rollout, ONE, state.updates, state.stages, None)
    _, metrics = programs.update(state, scored.batch, ONE, None, None)
    described = programs.describe(scored.batch, scored.keep)
    return jax.device_get(scored), results(metrics | scored.metrics | described)


def heard(setup, rollout, folder):
    """The rollout with the scores of the served teacher, the counters, and the log."""
    session = session_of(setup, folder)
    (listener,) = host_stages(session, setup.config.method)
    assert isinstance(listener, Listener)
    policies = Policies(student_of(setup), (), np.zeros((), np.int32))
    with_scores, stats = listener(rollout, policies), session.served_stats()
    connections(session).close()
    return with_scores, stats, " ".join(session.log)


@pytest.mark.parametrize(
    "name",
    ["sampled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("student", "teacher"))],
)
def test_a_teacher_here_and_over_http_give_the_same_loss_and_drop_the_same(name, ours, tmp_path):
    folder, url = ours
    here = set_up(load_config([*SMALL, *METHODS[name], f"teacher.path={folder}"]))
    rollout = make_rollout(here)
    params = [load_or_make(here.teachers[0], replicated(here.mesh))]
    resident, expected = updated(here, rollout, params)
    there = over(url, *METHODS[name])
    with_scores, stats, _ = heard(there, rollout, tmp_path)
    batch, values = updated(there, with_scores, [])
    assert abs(values["loss"] - expected["loss"]) < 1e-4 < abs(expected["loss"])
    assert values["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    np.testing.assert_array_equal(batch.keep, resident.keep)
    if name != "teacher":
        assert 0 < expected["method/keep_fraction"] < 1
    mask, scores, wanted = np.asarray(rollout.mask), batch.batch.scores, resident.batch.scores
    for model in ("student", "teacher"):
        found, true = getattr(scores, model), getattr(wanted, model)
        np.testing.assert_allclose(found.logprob[mask], true.logprob[mask], atol=1e-4)
    assert np.isnan(scores.teacher.entropy).all()
    if name != "sampled":
        np.testing.assert_array_equal(scores.support.ids[mask], wanted.support.ids[mask])
        near = (scores.support.teacher[mask], wanted.support.teacher[mask])
        np.testing.assert_allclose(*near, atol=1e-4)
        assert values["distill/overlap_ratio"] == pytest.approx(
            expected["distill/overlap_ratio"], abs=1e-3
        )
    assert set(expected) - set(values) == {
        "teacher_entropy", "teacher_entropy_max", "distill/entropy_gap"
    }, "what a served teacher does not return is left out"  # fmt: skip
    assert stats.get("served/missing_ids", 0) == 0 == stats["served/requests_failed"]
    again, stats, _ = heard(there, rollout, tmp_path)
    assert stats["served/requests_from_cache"] == 7, "each row with a response"
    jax.tree.map(np.testing.assert_array_equal, again, with_scores)


def test_of_a_server_with_its_top_k_only_the_other_ids_are_left_out_and_counted(tmp_path):
    with serving(EVERYTHING - {"given_ids"}, top=60) as server:
        setup = over(server.url, "method/local_support", STUDENT, top_logprobs=60)
        here = set_up(load_config([*SMALL, "method/opsa"]))  # for any rollout
        object.__setattr__(here, "teachers", (None,))
        rollout = make_rollout(here)
        with_scores, stats, log = heard(setup, rollout, tmp_path)
        scored, values = updated(setup, with_scores, [])
        assert "of the 60 most probable ids only" in log
    prompts, mask = jax.device_get((rollout.prompts, rollout.mask))
    tokens, own = np.asarray(rollout.tokens), jax.device_get(with_scores.early.student)
    batch, kl = scored.batch, np.zeros(mask.shape)
    missing = empty = 0
    for i, t in zip(*np.nonzero(mask), strict=True):
        before = tokens[i, t - 1] if t else prompts.teacher_tokens[i][prompts.teacher_length[i] - 1]
        place = server.logprobs[before]
        listed = {*np.argsort(-place)[:60].tolist(), int(tokens[i, t])}
        ids = batch.scores.support.ids[i, t]
        first = jax.device_get(own.top_ids)[i, t]
        np.testing.assert_array_equal(ids, first)
        known = ids >= 0
        assert set(ids[known].tolist()) <= listed
        missing += (~known).sum()
        np.testing.assert_allclose(
            batch.scores.support.teacher[i, t], np.where(known, place[ids], -np.inf), atol=1e-5
        )
        empty += not known.any()
        p = np.exp(np.float64(own.top_logprob[i, t][known]))
        q = np.exp(place[ids[known]])
        p, q = p / p.sum(), q / q.sum()
        kl[i, t] = (p * np.log(p / q)).sum()
    assert stats["served/missing_ids"] == missing > 0
    assert stats["served/scored_ids"] == 8 * mask.sum() > missing
    assert 0 < empty < mask.sum(), "some tokens have no id in common: no loss, and no NaN"
    share = np.asarray(batch.coefficient) * np.asarray(batch.weight)
    assert values["loss"] == pytest.approx((share * kl)[mask].sum(), abs=1e-5)
    assert values["loss"] > 1e-4 and np.isfinite(values["grad_norm"]) and not values["skipped"]


def test_a_server_with_too_short_lists_is_refused_where_its_own_are_the_support(tmp_path):
    with serving(EVERYTHING - {"given_ids"}, top=5) as server:
        setup = over(server.url, *METHODS["teacher"])
        session = session_of(setup, tmp_path)
        refused = r"returns the 5 most probable tokens, method.score needs 8; .*support=student"
        with pytest.raises(UserError, match=refused):
            Listener(session, setup.config.method)
        connections(session).close()


def other_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(f"+{digit}", special=False) for digit in range(10)])
    return tokenizer


ASKED = [None, Ask(0, []), Ask(0, list(b"12")), Ask(1, list(b"7")), Ask(2, list(b"5")), None]
"""Two places in each row."""


def spoken(server, folder, **keys):
    """The texts for `ASKED`, the prompts, and the session."""
    setup = over(server.url, "method/omniopd", **keys)
    loader = PromptLoader(setup.encoded, setup.train, prompts_per_step=3, group_size=1, seed=0)
    prompts, session = next(loader), session_of(setup, folder)
    try:
        speak = ServedSpeaker(session, setup.config.method, Continue(2, 5, 0.9, 0.8))
        server.seen.clear()
        found = speak(prompts, ASKED, Policies({}, (), np.zeros((), np.int32)))
    finally:
        connections(session).close()
    bodies = [body for _, body in server.seen]
    return found, prompts, setup, bodies, session


def test_token_ids_are_sent_to_a_server_that_has_ours(tmp_path):
    with serving() as server:
        found, prompts, _, bodies, _ = spoken(server, tmp_path, concurrency=1)
        assert [len(texts) for texts in found] == [0, 2, 2, 2, 2, 0]
        sent = {tuple(body["prompt"]): body for body in bodies}
        assert len(sent) == len(bodies) == 4
        lengths = [len(body["prompt"]) for body in bodies]
        assert lengths == sorted(lengths), "shorter prefixes first"
        for texts, ask in zip(found, ASKED, strict=True):
            if ask is None:
                continue
            context = prompts.teacher_tokens[ask.row][: prompts.teacher_length[ask.row]]
            body = sent[(*context.tolist(), *ask.prefix)]
            assert (body["n"], body["max_tokens"]) == (2, 5)
            assert (body["temperature"], body["top_p"]) == (0.9, 0.8)
            assert texts == [f" text {body['seed']} {i}" for i in range(2)]
        again, *_, bodies, _ = spoken(server, tmp_path)
        assert again == found and not bodies, "nothing is paid for twice"


@pytest.mark.parametrize("lacks, other", [(set(), True), ({"tokenize", "prompt_logprobs"}, False)])
def test_to_another_or_an_unknown_tokenizer_the_conversation_is_sent(lacks, other, tmp_path):
    """Our ids would be read there as other words."""
    with serving(EVERYTHING - lacks) as server:
        if other:
            server.tokenizer = other_tokenizer()
        found, prompts, setup, bodies, session = spoken(server, tmp_path)
        assert [len(texts) for texts in found] == [0, 2, 2, 2, 2, 0]
        problems = [setup.rows[int(row)].prompt[0]["content"] for row in prompts.row]
        wanted = []
        for ask in ASKED:
            if ask is not None:
                partial = bytes(ask.prefix).decode()
                turns = [("user", problems[ask.row])] + [("assistant", partial)] * bool(partial)
                wanted.append(turns)
        sent = [[(turn["role"], turn["content"]) for turn in body["messages"]] for body in bodies]
        assert sorted(sent) == sorted(wanted)
        assert ("sent messages, not token ids" in " ".join(session.log)) == other
        if other:
            with pytest.raises(UserError, match="its tokenizer is not ours"):
                spoken(server, tmp_path, continuation="completions")


def test_who_asks_for_completions_sends_text_where_ids_are_not_taken(tmp_path):
    with serving(EVERYTHING - {"ids", "tokenize"}) as server:
        found, *_, bodies, _ = spoken(server, tmp_path, continuation="completions")
        assert [len(texts) for texts in found] == [0, 2, 2, 2, 2, 0]
        assert all(body["prompt"].startswith("<|user|>") for body in bodies)
        assert sum(body["prompt"].endswith("<|end|><|assistant|>12") for body in bodies) == 1


def test_rows_are_asked_of_their_own_teachers(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "{i}", "of": "{"ab"[i % 2]}"}}\n' for i in range(8)))
    with serving() as one, serving() as two:
        two.text_of = lambda body, i: "two"
        setup = set_up(load_config([
            *SMALL, "method/omniopd", f"data.path={file}", "data.teacher_column=of",
            *(f"teachers.{name}.served={{url: '{server.url}', model: m}}"
              for name, server in (("a", one), ("b", two))),
        ]))  # fmt: skip
        loader = PromptLoader(setup.encoded, setup.train, prompts_per_step=8, group_size=1, seed=0)
        prompts, session = next(loader), session_of(setup, tmp_path)
        speak = ServedSpeaker(session, setup.config.method, Continue(1, 5))
        found = speak(
            prompts, [Ask(i, []) for i in range(8)], Policies({}, (), np.zeros((), np.int32))
        )
        assert {"two"} == {texts[0] for texts, at in zip(found, prompts.teacher, strict=True) if at}
        assert sum(texts != ["two"] for texts in found) == 4
        assert session.served_stats()["served/texts"] == 8 + 4
        assert sorted(each.name for each in (tmp_path / "served").iterdir()) == [
            "teacher_a.answers", "teacher_b.answers"
        ]  # fmt: skip
        session.connections.close()
