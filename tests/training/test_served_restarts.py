"""OmniOPD over HTTP against real servers that are killed midway: ours, and `transformers serve`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest

from fireopd_jax.recipe.schema import load_config
from fireopd_jax.remote.transport import Transport
from fireopd_jax.training.run import train
from tests.remote.test_foreign_server import Foreign, foreign  # noqa: F401
from tests.serving import served
from tests.training.test_served_runs import OMNI, over
from tests.training.test_training import COMMAND, lines

pytestmark = [pytest.mark.slow, pytest.mark.kill]


class Ours:
    """A process of `fireopd serve`, on one port."""

    def __init__(self, folder):
        self.folder, self.process = served.write_folder(folder), None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self):
        options = ["--port", str(self.port), "--max-tokens", "64", "--slots", "8"]
        with (self.folder.parent / "serve.log").open("ab") as log:
            command = [sys.executable, "-c", COMMAND, "serve", str(self.folder), *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)

    def wait(self):
        """Wait until it listens."""
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError((self.folder.parent / "serve.log").read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()


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
    server = Ours(tmp_path / "tiny")
    try:
        server.wait()
        check(server, tmp_path, monkeypatch, after=5)
    finally:
        server.kill()


@pytest.mark.parity
@pytest.mark.parametrize("form", ["auto", "completions"])
def test_transformers_serve_killed_midway(form, foreign, tmp_path, monkeypatch):  # noqa: F811
    assert isinstance(foreign, Foreign)
    foreign.wait()
    check(foreign, tmp_path, monkeypatch, after=12, continuation=form)
