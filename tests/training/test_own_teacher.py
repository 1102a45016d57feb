"""Runs whose teacher is the student itself: with which parameters, and resumed to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fireopd_jax.method.filtering import KeepAll
from fireopd_jax.method.losses.vocabulary import VocabularyDivergence
from fireopd_jax.method.reweighting import Uniform
from fireopd_jax.method.scoring import WholeVocabulary
from fireopd_jax.ops.formulas import ForwardKL
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.checkpoints import saved_steps
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.run import train
from fireopd_jax.training.state import init_state
from fireopd_jax.training.update import make_update
from tests import cases
from tests.training.test_training import BASE, lines

OWN = [*BASE, "method/opsd", "eval.problems=0", "run.steps=4", "run.completions_every=0",
       "rollout.max_tokens=8", "optim.learning_rate=1e-2", "run.keep=3",
       "method.teacher.prompt='{problem} is {reference}'"]  # fmt: skip
LORA = "student.lora={rank: 2}"
DECAY = 0.75
EMA = f"method.teacher={{kind: self, params: ema, decay: {DECAY}, prompt: reference}}"


def run(folder, *settings):
    return train(load_config([*OWN, *settings, f"run.dir={folder}"]))


def copied(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def watch(monkeypatch):
    """Note copies of the parameters of each step."""
    seen, score = [], Distillation.score

    def spied(self, policies, rollout, state):
        merge = self.programs.merged_params
        seen.append({
            "student": copied(policies.student),
            "teacher": [copied(each) for each in policies.teachers],
            "params": copied(state.params),
            "average": copied(state.average),
            "merged": None if state.average is None else copied(merge(self.adapted, state.average)),
            "judge": copied(self.judge(policies.teachers)),
        })  # fmt: skip
        return score(self, policies, rollout, state)

    monkeypatch.setattr(Distillation, "score", spied)
    return seen


def equal(ours, theirs):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("params", "lora"),
    [
        pytest.param("start", False, marks=slow),
        pytest.param("start", True, marks=slow),
        ("current", False),
        pytest.param("current", True, marks=slow),
        ("ema", False),
        ("ema", True),
    ],
)
def test_the_teacher_has_the_parameters_that_were_named(params, lora, tmp_path, monkeypatch):
    seen = watch(monkeypatch)
    settings = [LORA] if lora else []
    decay = f", decay: {DECAY}" if params == "ema" else ""
    settings += [f"method.teacher={{kind: self, params: {params}{decay}, prompt: reference}}"]
    run(tmp_path / "run", *settings, "run.steps=3")
    assert len(seen) == 3
    first = seen[0]["student"]
    for step, now in enumerate(seen):
        (teacher,) = now["teacher"]
        assert equal(now["judge"], teacher), "score and update ask the same teacher"
        assert step == 0 or not equal(now["student"], first), "the student learns"
        assert (now["average"] is not None) == (params == "ema")
        if params == "start":
            assert equal(teacher, first)
        elif params == "current":
            assert equal(teacher, now["student"])
        else:
            assert equal(teacher, now["merged"])
            before = seen[step - 1]["average"] if step else now["params"]
            wanted = jax.tree.map(
                lambda old, new: np.float64(DECAY) * old + (1 - DECAY) * np.float64(new),
                before, now["params"],
            )  # fmt: skip
            for ours, theirs in zip(
                jax.tree.leaves(now["average"]), jax.tree.leaves(wanted), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
            assert step == 0 or not equal(teacher, now["student"])
            assert step == 0 or not equal(teacher, first)
    trained = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in trained)
    assert [line["perf/compilations"] for line in trained][2:] == [0]
    assert "refine/leaked_fraction" in trained[0]


class Died(BaseException):
    """The process ends here."""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], [LORA]], ids=["whole", "lora"])
def test_a_run_with_a_moving_teacher_is_resumed_to_the_same_bits(settings, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", EMA, *settings)
    update = Distillation.update

    def dying(self, judge, state, scored):
        if int(state.updates) == 3:
            self.checkpoints.close()
            raise Died
        return update(self, judge, state, scored)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "update", dying)
        with pytest.raises(Died):
            run(tmp_path / "run", EMA, *settings)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
    seen = watch(monkeypatch)
    assert run(tmp_path / "run", EMA, *settings)["params_sha256"] == whole["params_sha256"]
    assert not equal(seen[0]["average"], seen[0]["params"]), "the average was not begun anew"


MODEL = cases.tiny_model(vocab_size=19, tie_word_embeddings=False)


def make_batch(student, teacher):
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None] < np.array([5, 3, 0, 1])[:, None]
    rollout = cases.make_rollout(mask)
    object.__setattr__(rollout, "tokens", rng.integers(0, 19, (4, 5)).astype(np.int32))
    object.__setattr__(rollout, "prompts", cases.make_prompts([1, 3, 2, 4], 4, vocab_size=19))
    scores = cases.scored(WholeVocabulary(), (MODEL, student), [(MODEL, teacher)], rollout)
    return cases.assembled(rollout, scores, KeepAll(), Uniform(), "token")[0]


@pytest.mark.parametrize("usable", [True, False])
def test_the_average_follows_applied_updates_only(usable):
    start, average = (cases.random_params(MODEL, seed) for seed in range(2))
    optimizer = optax.sgd(0.1)
    update = make_update(
        MODEL, VocabularyDivergence(divergence=ForwardKL()), optimizer,
        teacher=MODEL, decay=DECAY,
    )  # fmt: skip
    state = init_state(start, optimizer, averaged=True)
    assert equal(state.average, start)
    object.__setattr__(state, "average", average)
    batch = make_batch(start, average)
    if not usable:
        object.__setattr__(batch, "coefficient", jnp.zeros_like(batch.coefficient))
    after, metrics = jax.jit(update)(state, batch, jnp.float32(1), None, average)
    assert float(metrics["skipped"].total) == (not usable)
    assert equal(after.params, start) != usable
    if not usable:
        assert equal(after.average, average)
        return
    for old, new, ours in zip(
        *(jax.tree.leaves(tree) for tree in (average, after.params, after.average)), strict=True
    ):
        wanted = DECAY * np.float64(old) + (1 - DECAY) * np.float64(new)
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-8)
