"""Whole runs with teachers over HTTP: lost servers, spent budgets, refusals, and the key."""

import json
import sys
import threading
from collections import Counter

import pytest

from fireopd_jax import cli
from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import load_config
from fireopd_jax.runs.checkpoints import saved_steps
from fireopd_jax.training.run import train
from tests.remote.fake import SECRET, FakeServer, serving
from tests.serving import served
from tests.training.test_training import BASE, lines

N = 3
RUN = [*BASE, "eval.problems=0", "run.steps=3", "run.save_every=100", "optim.learning_rate=1e-2"]
OMNI = [*RUN, "method/omniopd", f"method.refine.continuations={N}", "method.refine.chunks=2",
        "method.refine.chunk_tokens=3"]  # fmt: skip

GRADED = [*OMNI, "eval.problems=4", "eval.samples=2", "eval.batch_size=8"]


def over(url, folder, *settings, model="m", **keys):
    keys = {"url": url, "model": model, "backoff_s": 0.01} | keys
    written = ", ".join(f"{name}: {value}" for name, value in keys.items())
    return [*settings, f"teachers.default.served={{{written}}}", f"run.dir={folder}"]


def paid(bodies):
    """How often each request for texts of chunks is among the bodies."""
    return Counter(json.dumps(body, sort_keys=True) for body in bodies if body.get("n") == N)


def answered(server):
    return paid(body for path, body in server.answered if path == "/v1/completions")


def everything(folder):
    """All bytes of all files of a run."""
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run, which sends a key and grades before and after: summary, folder, paid."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with serving(key=SECRET) as server, pytest.MonkeyPatch.context() as patched:
        patched.setenv("TEACHER_KEY", SECRET)
        keys = {"api_key_env": "TEACHER_KEY"}
        summary = train(load_config(over(server.url, folder, *GRADED, **keys)))
        return summary, folder, answered(server)


def test_a_teacher_of_texts_trains_the_student_and_the_key_is_nowhere(finished):
    summary, folder, requests = finished
    trained = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 and not line["skipped"] for line in trained)
    assert all(line["audit/chunks"] > 1 and 0 < line["audit/agreement"] < 1 for line in trained)
    texts = [line["served/texts"] for line in trained]
    assert texts[0] > N and sorted(set(texts)) == texts
    assert set(requests.values()) == {1} and trained[-1]["served/requests_failed"] == 0
    assert trained[-1]["perf/compilations"] == 0
    assert "teacher" not in summary and summary["student_after"]["problems"] == 4
    assert SECRET.encode() not in everything(folder) and len(everything(folder)) > 10_000
    assert "TEACHER_KEY" in (folder / "config.yaml").read_text()


def test_a_server_that_goes_away_and_comes_back_is_sent_nothing_twice(tmp_path):
    down = threading.Event()
    with serving() as server:
        after = []

        def script(number, path, body):
            if body.get("n") == N and len(answered(server)) >= 5 and not down.is_set():
                down.set()
                server.stop()
                threading.Timer(0.3, server.start).start()
                return "close"
            after.append(down.is_set())
            return None

        server.script = script
        settings = over(server.url, tmp_path / "run", *OMNI, "run.steps=2", retries=50)
        train(load_config(settings))
        assert down.is_set() and after[-1], "the server was down, and the run went on"
        assert set(answered(server).values()) == {1}
        last = lines(tmp_path / "run")[-1]
        assert last["step"] == 2 and last["served/requests_retried"] > 0
        assert last["served/requests_failed"] == 0
        assert last["served/requests_unanswered"] == last["served/requests_retried"]
        sent = paid(body for path, body in server.seen if path == "/v1/completions")
        again = sum(sent.values()) - len(sent)
        assert 1 <= again <= last["served/requests_unanswered"], "only those without an answer"


@pytest.mark.slow
def test_a_spent_budget_saves_what_is_done_and_a_larger_one_goes_on(
    finished, tmp_path, monkeypatch, capsys
):
    summary, undisturbed, requests = finished
    folder = tmp_path / "run"
    # The undisturbed run's cost of two steps, and of a request or two.
    (two,) = (line for line in lines(undisturbed) if line["step"] == 2 and "loss" in line)
    budget = int(two["served/total_tokens"]) + 220
    with serving() as server:
        command = over(server.url, folder, *GRADED, max_tokens_budget=budget)
        monkeypatch.setattr(sys, "argv", ["fireopd", "train", *command])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("fireopd: teacher 'default': budget spent: ")
        assert "raise it to go on" in said[-1] and "Traceback" not in "".join(said)
        assert saved_steps(folder / "checkpoints") == [2]
        assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 2]
        assert not (folder / "summary.json").exists()
        with pytest.raises(UserError, match="budget spent"):
            train(load_config(command))
        assert saved_steps(folder / "checkpoints") == [2]
        resumed = train(load_config(over(server.url, folder, *GRADED, max_tokens_budget=10**7)))
        assert resumed["params_sha256"] == summary["params_sha256"]
        assert [line["step"] for line in lines(folder) if "loss" in line] == [1, 2, 3]
        assert set(answered(server).values()) == {1}
        assert answered(server).keys() == requests.keys()


def refusal(settings, monkeypatch, capsys):
    """The last line of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "train", *settings])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr()
    assert caught.value.code == 2
    whole = shown.out + shown.err
    assert "Traceback" not in whole and SECRET not in whole
    return shown.err.strip().splitlines()[-1]


@pytest.mark.parametrize("method", ["omniopd", "opd"])
def test_a_server_that_is_down_a_wrong_key_and_an_unknown_model_are_one_line(
    method, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    settings = [*RUN, f"method/{method}"]
    server = FakeServer(key="another")
    try:
        line = refusal(over(server.url, tmp_path / "key", *settings), monkeypatch, capsys)
        assert line.startswith(f"fireopd: teacher 'default' at {server.url}: ")
        assert "status 401" in line and "OPENAI_API_KEY" in line and "***" in line
        server.key = None
        unknown = {"error": {"message": "the model 'm' does not exist"}}
        server.script = lambda number, path, body: (404, {}, unknown)
        line = refusal(over(server.url, tmp_path / "name", *settings), monkeypatch, capsys)
        assert "status 404: the model 'm' does not exist; check url" in line and "('m')" in line
    finally:
        server.stop()
    line = refusal(over(server.url, tmp_path / "down", *settings), monkeypatch, capsys)
    assert line.startswith(f"fireopd: teacher 'default' at {server.url}: no connection")
    for name in ("key", "name", "down"):
        assert SECRET.encode() not in everything(tmp_path / name)
        assert not list((tmp_path / name / "models").glob("*/model.json")), "nothing was made"


@pytest.mark.slow
def test_our_own_server_with_a_key_and_another_model(tmp_path, monkeypatch, capsys):
    folder = served.write_folder(tmp_path / "tiny")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with served.server(folder, key="another") as (client, service):
        url = f"{str(client.base_url).rstrip('/')}/v1"
        settings = [*RUN, "method/opd", "run.steps=2"]
        line = refusal(over(url, tmp_path / "a", *settings, model="tiny"), monkeypatch, capsys)
        assert "status 401: the API key is wrong or missing; check the key in" in line
        object.__setattr__(service, "key", SECRET)
        line = refusal(over(url, tmp_path / "b", *settings), monkeypatch, capsys)
        assert "status 404" in line and "tiny" in line and "('m')" in line
        train(load_config(over(url, tmp_path / "c", *settings, model="tiny")))
    trained = [line for line in lines(tmp_path / "c") if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in trained)
    assert trained[0]["served/requests_answered"] > 8 > trained[0]["served/requests_failed"]
    for name in "abc":
        assert SECRET.encode() not in everything(tmp_path / name)
