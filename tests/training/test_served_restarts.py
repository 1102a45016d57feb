"""OmniOPD over HTTP against real servers that are killed midway: ours, and `transformers serve`."""

import contextlib
import json
import threading
from collections import Counter

import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.remote.transport import Transport
from fireopd_jax.training.run import train
from tests.remote.processes import Server, transformers_serve
from tests.serving import served
from tests.training.test_served_runs import OMNI, over
from tests.training.test_training import COMMAND, lines

pytestmark = [pytest.mark.slow, pytest.mark.kill]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    with transformers_serve(tmp_path_factory.mktemp("foreign")) as server:
        yield server


@contextlib.contextmanager
def killed(server, patched, after):
    """Kill and start the server when it has answered `after` requests for texts of chunks.

    Yields how often each of them was sent, and how often its answer arrived.
    """
    sent, arrived, lock, send = Counter(), Counter(), threading.Lock(), Transport.send

    def spied(self, path, body):
        counted = body.get("max_tokens") == 3
        key = json.dumps(body, sort_keys=True)
        with lock:
            sent[key] += counted
            if counted and after is not None and arrived.total() >= after and not kills:
                kills.append(arrived.total())
                server.kill()
                server.start()
        answer = send(self, path, body)
        with lock:
            arrived[key] += counted
        return answer

    kills = []
    patched.setattr(Transport, "send", spied)
    yield sent, arrived
    assert bool(kills) == (after is not None)


def check(server, folder, monkeypatch, after, **keys):
    """Two steps through a kill, and the same run again from the answers on disk."""
    url = f"http://127.0.0.1:{server.port}/v1"
    settings = [*OMNI, "run.steps=2"]
    keys = {"model": str(server.folder), "retries": 300, "backoff_s": 0.2, "concurrency": 4} | keys
    with monkeypatch.context() as patched, killed(server, patched, after) as (sent, arrived):
        first = train(load_config(over(url, folder / "a", *settings, **keys)))
    trained = [line for line in lines(folder / "a") if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2]
    assert all(line["grad_norm"] > 0 and line["audit/chunks"] > 0 for line in trained)
    last = trained[-1]
    assert arrived.total() > after
    assert set(+arrived) == set(+sent) and set((+arrived).values()) == {1}, "each answer came once"
    again = sent.total() - arrived.total()
    assert 0 < again <= last["served/requests_retried"] and not last["served/requests_failed"]
    assert last["served/requests_unanswered"] > 0, "those in flight are counted"
    # Another run with the same file of answers sends nothing for chunks, and is the same.
    file = folder / "a" / "served" / "teacher_default.answers"
    keys |= {"cache_file": f"'{file}'"}
    server.wait()
    with monkeypatch.context() as patched, killed(server, patched, None) as (sent, _):
        second = train(load_config(over(url, folder / "b", *settings, **keys)))
    assert not +sent and second["params_sha256"] == first["params_sha256"]


def test_our_server_killed_midway(tmp_path, monkeypatch):
    folder = served.write_folder(tmp_path / "tiny")
    options = ["--max-tokens", "64", "--slots", "8"]
    server = Server(folder, [COMMAND, "serve", str(folder), *options])
    try:
        server.wait()
        check(server, tmp_path, monkeypatch, after=5)
    finally:
        server.kill()


@pytest.mark.parity
@pytest.mark.parametrize("form", ["auto", "completions"])
def test_transformers_serve_killed_midway(form, foreign, tmp_path, monkeypatch):
    foreign.wait()
    check(foreign, tmp_path, monkeypatch, after=12, continuation=form)
