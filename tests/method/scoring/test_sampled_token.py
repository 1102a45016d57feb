"""Scores of sampled tokens: each row by its own teacher, after that teacher's prompt."""

import dataclasses
import functools
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fireopd_jax import cli
from fireopd_jax.config import UserError
from fireopd_jax.method.scoring import SampledToken
from fireopd_jax.models.language_model import LanguageModel
from fireopd_jax.ops.dispatch import IMPLEMENTATIONS, PLATFORMS
from fireopd_jax.runtime.compilation import CompileCounter
from fireopd_jax.session import fits
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicate, shard_rows
from fireopd_jax.types import Rollout
from tests import cases
from tests.cases import make_prompts, random_params, response_stats, tiny_model

ROWS, TOKENS = 8, 5
STUDENT = tiny_model(24)
TEACHERS = (
    tiny_model(24, hidden_size=24, num_hidden_layers=2),
    tiny_model(24, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False),
    tiny_model(24, hidden_size=32, head_dim=6),
)
PARAMS = random_params(STUDENT)
WEIGHTS = [random_params(teacher, seed) for seed, teacher in enumerate(TEACHERS, 1)]
LENGTH = np.array([5, 3, 0, 5, 1, 4, 2, 5])
MIXED = (2, 0, 1, 0, 0, 2, 0, 1)


def make_case(route=MIXED):
    prompts = make_prompts([4, 1, 0, 3, 2, 4, 3, 1], 4, vocab_size=24, teacher=route)
    tokens = np.random.default_rng(9).integers(0, 24, (ROWS, TOKENS)).astype(np.int32)
    zeros = np.zeros(tokens.shape, np.float32)
    return Rollout(
        prompts=prompts,
        tokens=tokens,
        mask=np.arange(TOKENS)[None] < LENGTH[:, None],
        logprob=zeros,
        model_logprob=zeros,
        finished=np.ones(ROWS, bool),
        version=np.zeros(tokens.shape, np.int32),
        writer=np.zeros(tokens.shape, np.int32),
    )


@functools.cache
def program(count=3, micro_batch_size=None, teachers=TEACHERS, head_chunk=None):
    scorer = SampledToken(micro_batch_size=micro_batch_size, head_chunk=head_chunk)

    @jax.jit
    def score(params, weights, rollout, temperature):
        pairs = list(zip(teachers[:count], weights, strict=True))
        return cases.scored(scorer, (STUDENT, params), pairs, rollout, temperature)

    return score


@functools.cache
def direct(model):
    return jax.jit(functools.partial(response_stats, model))


def check(scores, rollout, temperature, skip=()):
    """Compare with scoring the whole batch by each model; `skip` names teachers to leave out."""
    prompts = rollout.prompts
    theirs = (prompts.teacher_tokens, prompts.teacher_length, rollout.tokens, rollout.mask)
    own = (prompts.tokens, prompts.length, rollout.tokens, rollout.mask)
    pairs = [(scores.student, direct(STUDENT)(PARAMS, *own, temperature), np.arange(ROWS))]
    for k in set(prompts.teacher.tolist()) - set(skip):
        wanted = direct(TEACHERS[k])(WEIGHTS[k], *theirs, temperature)
        pairs.append((scores.teacher, wanted, np.nonzero(prompts.teacher == k)[0]))
    for got, wanted, rows in pairs:
        for name in ("logprob", "entropy"):
            a, b = (np.asarray(getattr(x, name))[rows][rollout.mask[rows]] for x in (got, wanted))
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_one_teacher_scores_every_row(micro_batch_size):
    rollout = make_case((0,) * ROWS)
    scores = program(1, micro_batch_size)(PARAMS, WEIGHTS[:1], rollout, 1.0)
    check(scores, rollout, 1.0)
    # The student's prompt and the teacher's differ, and so do the models.
    assert np.abs(scores.student.logprob - scores.teacher.logprob)[rollout.mask].min() > 1e-4


@pytest.mark.parametrize(
    "route", [MIXED, (1,) * ROWS, (2, 2, 2, 2, 2, 2, 2, 0), (0, 1, 2, 0, 1, 2, 0, 1)]
)
def test_each_row_is_scored_by_its_own_teacher(route):
    rollout = make_case(route)
    check(program()(PARAMS, WEIGHTS, rollout, 1.0), rollout, 1.0)


def test_routed_blocks_of_several_rows_give_the_same():
    rollout = make_case()
    check(program(3, 4)(PARAMS, WEIGHTS, rollout, 1.0), rollout, 1.0)


def test_the_temperature_scales_student_and_teachers():
    rollout = make_case()
    check(program()(PARAMS, WEIGHTS, rollout, 0.6), rollout, 0.6)


@pytest.mark.parametrize("broken", range(3))
def test_a_broken_teacher_spoils_its_own_rows_only(broken):
    weights = list(WEIGHTS)
    weights[broken] = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), weights[broken])
    rollout = make_case()
    scores = program()(PARAMS, weights, rollout, 1.0)
    check(scores, rollout, 1.0, skip={broken})
    mine = rollout.mask & (rollout.prompts.teacher == broken)[:, None]
    assert mine.any() and np.isnan(np.asarray(scores.teacher.logprob)[mine]).all()


CALLS = []


@dataclasses.dataclass(frozen=True)
class Counted(LanguageModel):
    """A model that records each forward pass, by its width."""

    def response_hidden(self, *arguments, **options):
        jax.debug.callback(lambda: CALLS.append(self.config.hidden_size))
        return LanguageModel.response_hidden(self, *arguments, **options)


def test_a_teacher_runs_over_its_own_rows_only():
    counted = tuple(Counted(teacher.config, 24) for teacher in TEACHERS)
    score = program(3, 4, counted)
    for route, runs in [
        (MIXED, (1, 1, 1)),
        ((1, 1, 0, 1, 1, 0, 1, 0), (1, 2, 0)),
        ((2,) * ROWS, (0, 0, 2)),
    ]:
        CALLS.clear()
        jax.block_until_ready(score(PARAMS, WEIGHTS, make_case(route), 1.0))
        jax.effects_barrier()
        assert tuple(CALLS.count(teacher.config.hidden_size) for teacher in TEACHERS) == runs


def test_new_routes_and_temperatures_compile_nothing():
    score = program()
    score(PARAMS, WEIGHTS, make_case(), 1.0)
    others = [make_case(route) for route in ((0,) * ROWS, (2,) * ROWS, MIXED[::-1])]
    counter = CompileCounter()
    for case, temperature in zip(others, (1.0, 0.5, 2.0), strict=True):
        jax.block_until_ready(score(PARAMS, WEIGHTS, case, temperature))
    assert counter.count == 0


def test_no_gradient_passes():
    rollout = make_case((0,) * ROWS)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, weights):
        scores = program(1)(params, weights, rollout, 1.0)
        return sum(leaf.sum() for leaf in jax.tree.leaves(scores))

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient(PARAMS, WEIGHTS[:1])))


def test_eight_devices_score_what_one_scores():
    mesh = make_mesh(MeshConfig(data=8))
    rollout = make_case()
    params, weights = replicate(mesh, (PARAMS, WEIGHTS))
    scores = program()(params, weights, shard_rows(mesh, rollout), jnp.float32(1.0))
    check(scores, rollout, 1.0)


def test_the_chunk_reaches_student_and_teachers():
    rollout = make_case((0,) * ROWS)
    score = program(1, head_chunk=7)
    check(score(PARAMS, WEIGHTS[:1], rollout, 1.0), rollout, 1.0)
    chunk, own = (f"-> tensor<{ROWS * TOKENS}x{columns}xf32>" for columns in (7, 24))
    for chunked, seen, unseen in ((7, chunk, own), (None, own, chunk)):
        text = program(1, head_chunk=chunked).lower(PARAMS, WEIGHTS[:1], rollout, 1.0).as_text()
        # Both models have the same vocabulary: each has its own product.
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert sum(seen in line for line in products) >= 2
        assert not any(unseen in line for line in products)


def test_a_recipe_can_name_every_implementation():
    literal, none = typing.get_args(typing.get_type_hints(SampledToken)["head"])
    assert typing.get_args(literal) == IMPLEMENTATIONS and none is type(None)


@pytest.mark.parametrize("name", sorted(PLATFORMS))
def test_a_kernel_of_another_platform_is_refused(name):
    with pytest.raises(UserError) as raised:
        fits.check_kernel(name)
    platform = PLATFORMS[name].upper()
    assert str(raised.value) == (
        f"method.score.head={name} runs on {platform} only, this machine has CPU; "
        "expected one of reference, chunked"
    )


@pytest.mark.parametrize("name", [None, "reference", "chunked", "pallas_tpu"])
def test_what_runs_here_is_not_refused(monkeypatch, name):
    monkeypatch.setitem(PLATFORMS, "pallas_tpu", "cpu")
    fits.check_kernel(name)


def test_a_run_with_such_a_kernel_does_not_begin(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    arguments = ("smoke", "method.score.head=pallas_tpu", f"run.dir={folder}")
    monkeypatch.setattr(sys, "argv", ["fireopd", "train", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2 and not folder.exists()
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("fireopd: method.score.head=pallas_tpu")
