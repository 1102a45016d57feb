"""Programs that mean harm: none escapes, hangs, harms, or leaves anything behind.

Every program runs in every layer of isolation that the system has. A program that tries several
things prints "escaped NAME" for each that it could do.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fireopd_jax.evaluation.launching import launchers
from fireopd_jax.evaluation.sandbox import Sandbox
from tests.evaluation.hostile import (
    ATTEMPT,
    BUSY,
    CRASHES,
    DAEMON,
    DEAF,
    DISK,
    ERRORS,
    EXECUTE,
    FORKS,
    MEMORY,
    NEW_RIGHTS,
    OUTPUT,
    OUTSIDE,
    PACKAGES,
    RIGHTS,
    ROUGH_FILES,
    SECRETS,
    SIGNALS,
    SLEEP,
    SLOW_EXIT,
    SOCKETS,
    SPINNING_THREADS,
    STOPPED,
    ZOMBIES,
)
from tests.evaluation.sandboxes import (
    EVERY_LAYER,
    LAYERS,
    LIMITS,
    QUICK,
    mark_launchers,
    nothing_remains,
    processes,
    refusal,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux isolates programs")

OPEN = {"isolation": "none", "seccomp": False}


class Outside:
    """What programs try to reach: servers, a secret file, this process."""

    def __init__(self, folder: Path):
        self.name = f"escaped-{uuid.uuid4().hex}"
        self.secret = folder / "secret.txt"
        self.secret.write_text("HIDDEN")
        self.buffer = bytearray(b"HIDDEN")
        self.signals: list[int] = []
        self.sockets = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "s")),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.name}"),
            ("datagrams", socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "d")),
        ):
            server = self.sockets[name] = socket.socket(family, kind)
            server.bind(address)
            server.setblocking(False)
            if kind == socket.SOCK_STREAM:
                server.listen()

    def values(self) -> dict[str, object]:
        """Return what programs are told."""
        return {
            "tcp": self.sockets["tcp"].getsockname()[1],
            "udp": self.sockets["udp"].getsockname()[1],
            "unix": self.sockets["unix"].getsockname(),
            "abstract": f"\0{self.name}",
            "datagrams": self.sockets["datagrams"].getsockname(),
            "parent": os.getpid(),
            "secret": str(self.secret),
            "address": id(self.buffer),
            "name": self.name,
            "folders": ["/", "/tmp", "/var/tmp", "/dev/shm", str(Path.home()), os.getcwd()],
            "site": [path for path in sys.path if "site-packages" in path],
        }

    def arrived(self) -> list[str]:
        """Return the servers that a program reached."""
        reached = []
        for name, server in self.sockets.items():
            try:
                if server.type == socket.SOCK_STREAM:
                    server.accept()[0].close()
                else:
                    server.recv(9)
                reached.append(name)
            except BlockingIOError:
                pass
        return reached


@pytest.fixture
def outside(tmp_path, monkeypatch):
    monkeypatch.setenv("FIREOPD_SECRET", "HIDDEN")
    outside = Outside(tmp_path)
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGIO)
    old = {n: signal.signal(n, lambda n, _: outside.signals.append(n)) for n in numbers}
    yield outside
    for number, handler in old.items():
        signal.signal(number, handler)
    for server in outside.sockets.values():
        server.close()


@pytest.fixture(params=EVERY_LAYER)
def layer(request):
    if why := refusal(request.param):
        pytest.skip(why)
    return request.param


def run(program, layer, outside, monkeypatch, limits=LIMITS):
    """Run a program; check that it was in vain, whatever its outcome."""
    mark = mark_launchers(monkeypatch)
    mounts, start = Path("/proc/self/mountinfo").read_text(), time.monotonic()
    with Sandbox(program, limits, **LAYERS[layer]) as sandbox:
        outcome = sandbox.script("input\n")
    launchers.close()
    assert time.monotonic() - start < 15
    assert nothing_remains(mark)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert outside.secret.read_text() == "HIDDEN"
    assert outside.arrived() == []
    assert outside.signals == []
    assert len(outcome.stdout) <= LIMITS.output_bytes
    assert "HIDDEN" not in outcome.stdout + outcome.stderr
    for folder in outside.values()["folders"]:
        assert not Path(folder, outside.name).exists()
    return outcome


@pytest.mark.parametrize(
    "program, limit",
    [(SLEEP, "time"), (DEAF, "time"), (BUSY, "time"), (STOPPED, "time"), (SLOW_EXIT, "time"),
     (SPINNING_THREADS, "time"), (OUTPUT, "output"), (ERRORS, "time")],
    ids=["sleep", "deaf", "busy", "stopped", "slow exit", "threads", "output", "errors"],
)  # fmt: skip
def test_what_does_not_end_is_ended_at_its_limit(program, limit, layer, outside, monkeypatch):
    assert run(program, layer, outside, monkeypatch, QUICK).limit == limit


@pytest.mark.parametrize(
    "program", [FORKS, DAEMON, ZOMBIES, EXECUTE, NEW_RIGHTS],
    ids=["bomb", "daemon", "zombies", "execute", "new rights"],
)  # fmt: skip
def test_no_program_has_processes(program, layer, outside, monkeypatch):
    outcome = run(ATTEMPT + program, layer, outside, monkeypatch)
    if layer != "namespaces alone":  # There they end with their namespace.
        assert (outcome.stdout, outcome.exit_code) == ("", 0), outcome


@pytest.mark.parametrize(
    "program", [SOCKETS, SECRETS, OUTSIDE, RIGHTS, PACKAGES],
    ids=["sockets", "secrets", "outside", "rights", "packages"],
)  # fmt: skip
def test_no_program_reaches_what_is_outside(program, layer, outside, monkeypatch):
    outcome = run(ATTEMPT + filled(program, outside), layer, outside, monkeypatch)
    assert (outcome.stdout, outcome.exit_code) == ("", 0), outcome


def test_the_attempts_succeed_without_isolation(outside):
    """Else the tests above would hold for any sandbox."""
    escaped = []
    for program in (SOCKETS, SECRETS):
        with Sandbox(ATTEMPT + filled(program, outside), LIMITS, **OPEN) as sandbox:
            escaped += sandbox.script("").stdout.splitlines()
    names = [line.removeprefix("escaped ") for line in escaped]
    assert {"tcp", "unix", "abstract", "sendto", "sendmsg"} <= {each.split()[0] for each in names}
    assert any(name.startswith(f"{outside.secret} b'HIDDEN'") for name in names), names
    assert sorted(outside.arrived()) == ["abstract", "datagrams", "tcp", "udp", "unix"]


def filled(program, outside):
    """Return a program with the addresses and paths of what is outside."""
    for name, value in outside.values().items():
        for form, text in ((f"{{{name}}}", str(value)), (f"{{{name}!r}}", repr(value))):
            program = program.replace(form, text)
    return program


def test_no_program_signals_others(layer, outside, monkeypatch):
    outcome = run(ATTEMPT + filled(SIGNALS, outside), layer, outside, monkeypatch)
    assert outcome.stdout == "", outcome


def test_memory_is_bounded(layer, outside, monkeypatch):
    outcome = run(ATTEMPT + MEMORY, layer, outside, monkeypatch)
    if layer != "namespaces alone":
        assert outcome.stdout == "", outcome
    assert "escaped bytes" not in outcome.stdout
    assert "escaped mmap" not in outcome.stdout


def test_files_are_bounded(layer, outside, monkeypatch):
    outcome = run(ATTEMPT + DISK, layer, outside, monkeypatch)
    assert outcome.stdout == "", outcome


def test_no_files_are_left(layer, outside, monkeypatch):
    assert run(ATTEMPT + ROUGH_FILES, layer, outside, monkeypatch).exit_code == 0


def test_a_test_begins_with_an_empty_folder(layer):
    program = "import os\nprint(os.listdir('.'))\nos.makedirs('a/b')\nos.chmod('a', 0)"
    if layer == "filters":
        pytest.skip("no program writes files there")
    with Sandbox(program, LIMITS, **LAYERS[layer]) as sandbox:
        assert [sandbox.script("").stdout for _ in range(3)] == ["[]\n"] * 3


@pytest.mark.parametrize("program", CRASHES.values(), ids=CRASHES)
def test_a_crash_is_an_outcome(program, layer, outside, monkeypatch):
    outcome = run(program, layer, outside, monkeypatch)
    expected = {"segfault": -signal.SIGSEGV, "abort": -signal.SIGABRT, "exit 3": 3, "_exit 4": 4,
                "no text": 1, "no standard streams": outcome.exit_code}  # fmt: skip
    name = next(name for name, each in CRASHES.items() if each == program)
    if name == "recursion":
        assert outcome.exit_code != 0 or outcome.limit
    else:
        assert (outcome.exit_code, outcome.limit) == (expected[name], None)


def test_a_sandbox_serves_after_a_crash(layer):
    program = (
        "import os, signal\nif input() == 'end': os.kill(os.getpid(), signal.SIGKILL)\nprint(7)"
    )
    with Sandbox(program, LIMITS, **LAYERS[layer]) as sandbox:
        outcomes = [sandbox.script(text) for text in ("go\n", "end\n", "go\n")]
    assert [each.stdout for each in outcomes] == ["7\n", "", "7\n"]
    assert outcomes[1].exit_code == -signal.SIGKILL


def test_many_hostile_programs_at_once_leave_nothing(monkeypatch):
    mark = mark_launchers(monkeypatch)

    def run_one(program):
        with Sandbox(ATTEMPT + program, QUICK) as sandbox:
            return sandbox.script("")

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(run_one, (FORKS, SLEEP, MEMORY, OUTPUT, BUSY, DAEMON)))
    launchers.close()
    limits = [each.limit for each in outcomes]
    assert limits[1:5:3] + limits[3:4] == ["time", "time", "output"], limits
    assert nothing_remains(mark)


TRAINER = """
import sys
from fireopd_jax.evaluation import launching, sandbox
launching.OPTIONS = ("-X", sys.argv[1], *launching.OPTIONS)
with sandbox.Sandbox("import time\\nprint(1)\\ntime.sleep(1000)") as sandbox:
    print("ready", flush=True)
    sandbox.script("")
"""


@pytest.mark.kill
def test_nothing_outlives_a_killed_trainer():
    mark = f"mark={uuid.uuid4().hex}"
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, mark], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    while len(processes(mark)) < 4:  # The trainer itself, the launcher, pid 1, the program.
        time.sleep(0.01)
    trainer.kill()
    trainer.communicate()
    assert nothing_remains(mark)
