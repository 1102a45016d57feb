"""`fireopd eval`: figures on sets and of files, comparisons, and what cannot be evaluated."""

import json

import numpy as np
import pytest

from fireopd_jax.commands.evaluate import EvalOptions, Evaluated, evaluate_to
from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.evaluation.graders import grade
from tests.cases import tiny_model
from tests.commands import calling
from tests.commands.calling import TOKENIZER, model_folder

MODEL = tiny_model(len(TOKENIZER), num_hidden_layers=1, max_position_embeddings=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory, MODEL)


@pytest.fixture(scope="module")
def problems(folder, tmp_path_factory):
    """Return a set whose answers are responses of the model: some samples are right."""
    home = tmp_path_factory.mktemp("set")
    prompts, file = home / "p.jsonl", home / "own.jsonl"
    asked = ["a", "b+c", "what is it?", "a"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    generate_to_file(str(folder), prompts, home / "o", GenerateOptions(max_tokens=8, seed=5))
    texts = [json.loads(line)["text"] for line in (home / "o").read_text().splitlines()]
    texts[3] = texts[0]
    rows = [{"prompt": p, "answer": t or "0"} for p, t in zip(asked, texts, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def options(*sets, **changed):
    return EvalOptions(sets=tuple(map(str, sets)), **{"samples": 3, "max_tokens": 8} | changed)


def call(monkeypatch, *arguments):
    return calling.call(monkeypatch, "eval", *map(str, arguments))


@pytest.fixture(scope="module")
def evaluated(folder, problems, tmp_path_factory):
    home = tmp_path_factory.mktemp("out")
    found = evaluate_to(
        Evaluated(str(folder)), options(problems), out=home / "a.jsonl", figures=home / "a.json"
    )
    return found, home


def test_figures_are_those_of_the_responses_that_are_written(evaluated, problems):
    found, home = evaluated
    assert json.loads((home / "a.json").read_text())["sets"]["own"]["problems"] == 4
    rows = [json.loads(line) for line in (home / "a.jsonl").read_text().splitlines()]
    assert [(row["row"], row["sample"]) for row in rows] == [
        (i, j) for i in range(4) for j in range(3)
    ]
    gold = [json.loads(line) for line in problems.read_text().splitlines()]
    for row in rows:
        assert row["set"] == "own" and row["origin"] == f"{problems}:{row['row'] + 1}"
        assert row["prompt"] == gold[row["row"]]["prompt"]
        assert row["correct"] == grade(row["response"], gold[row["row"]]["answer"])
        assert row["finished"] or row["tokens"] == 8
    own = found["sets"]["own"]
    assert own["avg@3"] == pytest.approx(np.mean([row["correct"] for row in rows]))
    assert own["mean_length"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert own["truncated"] == pytest.approx(np.mean([not row["finished"] for row in rows]))
    assert own["questions"] == 3
    assert set(own) >= {"pass@1", "pass@2", "pass@3", "maj@3", "interval_95"}


def test_a_file_of_responses_has_the_same_figures(evaluated):
    found, home = evaluated
    again = evaluate_to(Evaluated(str(home / "a.jsonl")))
    np.testing.assert_equal(again["sets"], found["sets"])


def test_responses_depend_on_the_seed_alone(folder, problems, evaluated, tmp_path):
    _, home = evaluated
    one = Evaluated(str(folder))
    evaluate_to(one, options(problems, slots=2), out=tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text() == (home / "a.jsonl").read_text()
    evaluate_to(one, options(problems, seed=1), out=tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_text() != (home / "a.jsonl").read_text()


def test_a_model_is_compared_with_a_file_and_with_itself(folder, problems, evaluated):
    _, home = evaluated
    against = Evaluated(str(home / "a.jsonl"))
    found = evaluate_to(Evaluated(str(folder)), options(problems), against=against)
    same = found["sets"]["own"]["comparison"]
    assert same["difference"] == 0 and same["p"] == 1 and same["questions"] == 3
    found = evaluate_to(
        Evaluated(str(folder)), options(problems, temperature=0.0, samples=None), against=against
    )
    own = found["sets"]["own"]
    assert own["comparison"]["difference"] == pytest.approx(own["avg@1"] - own["against"]["avg@3"])


def test_several_sets_have_their_own_figures(folder, problems, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text('{"q": "5+5", "gold": 10}\n{"q": "7", "gold": 7}\n')
    arguments = ["--set", other, "--set", f"again={other}", "--samples", 2, "--max-tokens", 4]
    columns = ["data.prompt_column=q", "data.answer_column=gold"]
    assert call(monkeypatch, folder, *arguments, *columns) == 0
    printed = capsys.readouterr()
    sets = json.loads(printed.out)["sets"]
    assert list(sets) == ["other", "again"] and sets["other"] == sets["again"]
    assert "eval set other: 2 problems" in printed.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--samples", 2], "--samples 2: expected with --set FILE"),
        (["--step", 3], "--step 3: expected with --set FILE"),
        (["--chat-template", "plain"], "--chat-template plain: expected with --set FILE"),
        ([], "give them: --set FILE"),
        (["--set", "SET", "run.seed=3"], "run.seed=3: with --set only eval.samples"),
        (["--set", "SET", "data.path=x"], "data.path=x: with --set only"),
        (["--set", "SET", "eval.smaples=3"], "eval.smaples=3: with --set only"),
        (["--set", "SET", "data.answer_colum=x"], "did you mean 'data.answer_column'"),
        (["--set", "SET", "--set", "SET"], "a set 'own' is given twice"),
        (["--set", "nowhere.jsonl"], "no file 'nowhere.jsonl'"),
        (["--set", "SET", "--greedy", "--samples", 2], "2 samples at temperature 0"),
        (["--set", "SET", "--greedy", "--temperature", 1], "conflict"),
        (["--set", "SET"], "own.jsonl:3: the prompt has "),
        (["--set", "SET", "--max-tokens", 64], "--max-tokens of at most "),
        (["--set", "SET", "eval.samples=0"], "eval.samples"),
        (["--set", "SET", "--out", "SET"], "exists; expected a new file"),
        (["--set", "SET", "--json", "SET"], "exists; expected a new file"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, folder, problems, arguments, words):
    arguments = [problems if each == "SET" else each for each in arguments]
    assert call(monkeypatch, folder, *arguments) == 2
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert line.startswith("fireopd: ") and words in line, line
    assert printed.out == "" and "Traceback" not in printed.err


def test_no_samples_are_refused(monkeypatch, capsys, folder, problems):
    assert call(monkeypatch, folder, "--set", problems, "--samples", 0) == 2
    assert "--samples" in capsys.readouterr().err


def test_a_file_is_not_sampled_nor_compared_with_a_model(evaluated, folder, problems):
    _, home = evaluated
    file = Evaluated(str(home / "a.jsonl"))
    with pytest.raises(UserError, match="nothing is sampled"):
        evaluate_to(file, options(problems))
    with pytest.raises(UserError, match="is a file; expected another one"):
        evaluate_to(file, against=Evaluated(str(folder)))
