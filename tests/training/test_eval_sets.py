"""Evaluation sets during training: when, with which settings, and nothing else changes."""

import json

import numpy as np
import pytest

from fireopd_jax.commands.evaluate import EvalOptions, Evaluated, evaluate_to
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load, load_config
from fireopd_jax.training.run import train

MODEL = (
    "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 8, intermediate_size: 32, max_position_embeddings: 64}"
)
SETTINGS = [
    "data.path=builtin:addition-1",
    "data.max_prompt_tokens=8",
    "rollout.batch_size=8",
    "rollout.max_tokens=16",
    f"student.architecture={MODEL}",
    "student.sft={steps: 40, batch_size: 32, optim: {learning_rate: 1e-2}}",
    f"teacher.architecture={MODEL}",
    "run.steps=3",
    "eval.problems=4",
    "eval.samples=1",
]


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Return a set with a prompt that is trained on, and one that is there twice."""
    file = tmp_path_factory.mktemp("sets") / "sums.jsonl"
    rows = [{"prompt": f"{i}+{i + 10}", "answer": str(2 * i + 10)} for i in range(3)]
    rows += [rows[0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def run(sums, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    sets = [
        f"eval.sets.sums.path={sums}",
        "eval.sets.sums={samples: 2, max_tokens: 5, temperature: 0.7, every: 2}",
        "eval.sets.own={path: builtin:addition-1, problems: 5, every: 0}",
    ]
    return folder, train(load_config([*SETTINGS, *sets, f"run.dir={folder}"]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return folder, train(load_config([*SETTINGS, f"run.dir={folder}"]))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sets_are_evaluated_at_the_start_the_end_and_between(run):
    folder, summary = run
    steps = {
        name: [line["step"] for line in lines(folder) if f"eval/{name}/mean_length" in line]
        for name in ("sums", "own")
    }
    assert steps == {"sums": [0, 2, 3], "own": [0, 3]}
    for name in ("sums", "own"):
        found = summary["sets"][name]
        assert set(found) == {"student_before", "student_after", "controls"}
        logged = [line for line in lines(folder) if f"eval/{name}/mean_length" in line]
        for figures, line in (
            (found["student_before"], logged[0]),
            (found["student_after"], logged[-1]),
        ):
            for key, value in figures.items():
                np.testing.assert_equal(float(line[f"eval/{name}/{key}"]), value)
    sums = summary["sets"]["sums"]["student_after"]
    assert (sums["problems"], sums["questions"]) == (4, 3) and "maj@2" in sums
    assert summary["sets"]["own"]["student_after"]["problems"] == 5
    card = (folder / "README.md").read_text()
    assert "On sums:" in card and "avg@2" in card and "On held-out problems:" in card


def test_a_set_has_its_own_length_limit(run):
    folder, _ = run

    def lengths(label):
        rows = (folder / "eval" / f"{label}.jsonl").read_text().splitlines()
        return [json.loads(row)["tokens"] for row in rows]

    assert len(lengths("student_step_000002.sums")) == 8
    assert max(lengths("student_step_000002.sums")) == 5
    assert 5 < max(lengths("student_after.own")) <= 16


def test_overlap_and_duplicates_are_said(run):
    folder, _ = run
    log = (folder / "logs" / "run.log").read_text()
    assert "eval set sums: 4 problems, 3 questions" in log
    assert "eval set own: warning: " in log and "of 5 problems are trained on" in log
    assert "eval set sums: warning" not in log


@pytest.mark.slow
def test_sets_change_nothing_else(run, plain):
    (folder, summary), (other, without) = run, plain
    assert summary["params_sha256"] == without["params_sha256"]
    for key in ("student_before", "student_after", "teacher"):
        np.testing.assert_equal(summary[key], without[key])
    assert "sets" not in without
    assert not [path for path in (other / "eval").iterdir() if ".sums." in path.name]
    losses = [[line["loss"] for line in lines(at) if "loss" in line] for at in (folder, other)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_command_samples_what_the_run_sampled(run, sums, tmp_path):
    folder, summary = run
    options = EvalOptions(sets=(str(sums),), samples=2, max_tokens=5, temperature=0.7)
    found = evaluate_to(Evaluated(str(folder)), options, out=tmp_path / "a.jsonl")
    np.testing.assert_equal(found["sets"]["sums"], summary["sets"]["sums"]["student_after"])
    before = folder / "eval" / "student_before.sums.jsonl"
    found = evaluate_to(Evaluated(str(folder)), options, against=Evaluated(str(before)))
    assert found["sets"]["sums"]["against"] == summary["sets"]["sums"]["student_before"]
    step = evaluate_to(
        Evaluated(str(folder), step=3), options, against=Evaluated(str(tmp_path / "a.jsonl"))
    )
    assert step["sets"]["sums"]["comparison"]["difference"] == 0


def test_a_run_is_compared_before_and_after_on_its_held_out_problems(run):
    folder, summary = run
    after, before = (
        Evaluated(str(folder / "eval" / f"student_{when}.jsonl")) for when in ("after", "before")
    )
    own = evaluate_to(after, against=before)["sets"]["held_out"]
    np.testing.assert_equal(own.pop("against"), summary["student_before"])
    gained = summary["student_after"]["avg@1"] - summary["student_before"]["avg@1"]
    assert own.pop("comparison")["difference"] == pytest.approx(gained)
    np.testing.assert_equal(own, summary["student_after"])


@pytest.mark.slow
def test_a_run_without_held_out_problems_may_have_sets(sums, tmp_path):
    arguments = [*SETTINGS, "eval.problems=0", "run.steps=1", f"eval.sets.s.path={sums}"]
    summary = train(load_config([*arguments, f"run.dir={tmp_path}/run"]))
    assert "student_after" not in summary and summary["sets"]["s"]["student_after"]["problems"] == 4
    assert "On s:" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "settings, words",
    [
        ("eval.sets.s={path: SUMS, max_tokens: 64}", r"sums\.jsonl:\d: the prompt has \d+ tokens"),
        ("eval.sets.s={path: SUMS, answer_column: x}", r"sums\.jsonl:1: no column 'x'"),
        ("eval.sets.s={path: nowhere.jsonl}", "no file 'nowhere.jsonl'"),
        ("eval.sets.s={path: SUMS, samples: 0}", r"eval\.sets\.s\.samples"),
        ("eval.sets.s={path: SUMS, grader: mahts}", r"eval\.sets\.s\.grader: unknown kind 'mahts'"),
        ("eval.sets.s={samples: 2}", r"eval\.sets\.s"),
        ("eval.sets.s={path: SUMS, smaples: 2}", r"did you mean 'eval\.sets\.s\.samples'"),
        ("eval.sets.held_out={path: SUMS}", "'held_out' is no name of a set"),
        ("eval.sets={a/b: {path: SUMS}}", "'a/b' is no name of a set"),
    ],
)
def test_a_set_that_cannot_be_evaluated_leaves_no_folder(sums, tmp_path, settings, words):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=words):
        train(load_config([*SETTINGS, settings.replace("SUMS", str(sums)), f"run.dir={folder}"]))
    assert not folder.exists()


def test_keys_without_effect_are_warned_of():
    def idle(*settings):
        notes = load(["teacher={}", *settings]).notes
        return [note for note in notes if note.startswith("warning")]

    assert idle("eval.sets.s.path=x", "eval.problems=0", "eval.every=3", "eval.temperature=2") == []
    (warning,) = idle("eval.sets.s={path: x, temperature: 0}", "eval.sets.s.top_p=0.5")
    assert "eval.sets.s.top_p has no effect" in warning
    (warning,) = idle("eval.sets.s.path=x", "eval.problems=0", "eval.samples=3")
    assert "eval.samples has no effect" in warning
