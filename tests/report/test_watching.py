"""A page that follows its run: made anew when a file changes, for this machine only."""

import http.client
import os
import signal
import subprocess
import sys
import time

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.report import watching as module
from fireopd_jax.report.watching import WatchedPage, watching
from fireopd_jax.runs.tracking import Tracker
from tests.report.made import make_run


def ask(address, path="/", host=None):
    port = int(address.rstrip("/").rpartition(":")[2])
    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    asked.request("GET", path, headers={} if host is None else {"Host": host})
    answer = asked.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    run = make_run(tmp_path / "x")
    before = sorted(path.name for path in run.iterdir())
    with watching(WatchedPage([str(run)]), 0) as address:
        status, page = ask(address)
        assert status == 200 and '"steps":6' in page
        version = ask(address, "/version")
        assert ask(address, "/version") == version
        with Tracker(run) as tracker:
            tracker.log(7, {"loss": 0.125})
        assert ask(address, "/version") != version
        assert '"steps":7' in ask(address)[1]
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_page_is_not_made_twice_in_a_short_time(tmp_path):
    run = make_run(tmp_path / "x")
    watched = WatchedPage([str(run)])
    page = watched.html()
    with Tracker(run) as tracker:
        tracker.log(7, {"loss": 0.125})
    assert watched.html() is page


def test_only_this_machine_is_answered(tmp_path):
    run = make_run(tmp_path / "x", steps=0)
    with watching(WatchedPage([str(run)]), 0) as address:
        assert ask(address, host="evil.example:8100")[0] == 403
        assert ask(address, host="localhost:8100")[0] == 200
        assert ask(address, "/../config.yaml")[0] == 404
        port = int(address.rstrip("/").rpartition(":")[2])
        taken = pytest.raises(UserError, match=f"--port {port}: Address already in use")
        with taken, watching(WatchedPage([str(run)]), port):
            pass


def test_a_run_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        WatchedPage([str(tmp_path / "none")])


def test_the_command_prints_its_address_and_ends_by_a_signal(tmp_path):
    run = make_run(tmp_path / "x", steps=0)
    command = [sys.executable, "-m", "fireopd_jax", "watch", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        line = process.stdout.readline()
        assert line.startswith(f"{run}: http://127.0.0.1:")
        assert ask(line.split()[1])[0] == 200
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.wait(20) == 0 and time.monotonic() - start < 5
