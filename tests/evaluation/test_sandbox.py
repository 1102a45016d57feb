"""Sandboxes: what a program gets, which isolation is taken, what is kept between programs."""

import dataclasses
import multiprocessing
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.evaluation import launching
from fireopd_jax.evaluation import sandbox as module
from fireopd_jax.evaluation.jail import seccomp
from fireopd_jax.evaluation.launching import launchers
from fireopd_jax.evaluation.sandbox import Limits, Refused, Sandbox, strongest
from tests.evaluation.sandboxes import EVERY_LAYER, LAYERS, LIMITS, mark_launchers, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux isolates programs")

SCRIPTS = {
    "lines": ("print(sum(int(input()) for _ in range(2)))", "1\n2\n", "3\n"),
    "whole input": ("import sys\nprint(len(sys.stdin.read()))", "x" * 3_000_000, "3000000\n"),
    "bytes": ("import os\nprint(os.read(0, 9))", "ab", "b'ab'\n"),
    "exit": ("print(1)\nexit()", "", "1\n"),
    "quit": ("print(1)\nquit()", "", "1\n"),
    "main guard": ("if __name__ == '__main__':\n    print(1)", "", "1\n"),
    "threads": (
        "import sys, threading\nthreading.stack_size(64 << 20)\nsys.setrecursionlimit(10**6)\n"
        "def depth(n): return 0 if not n else 1 + depth(n - 1)\n"
        "threading.Thread(target=lambda: print(depth(20000))).start()",
        "",
        "20000\n",
    ),
    "at exit": ("import atexit, os\natexit.register(lambda: os.write(1, b'late'))", "", "late"),
    "asyncio": (
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\n"
        "print(asyncio.run(f()))",
        "",
        "5\n",
    ),
    "modules": (
        "import bisect, collections, datetime, decimal, fractions, heapq, itertools, json, random\n"
        "import re, sqlite3, statistics, string, typing, zlib, hashlib, unicodedata\nprint(1)",
        "",
        "1\n",
    ),
    "numpy": ("import numpy as np\nprint(int(np.arange(5).sum()))", "", "10\n"),
    "text": ("print(input() + 'é')", "ü☃\n", "ü☃é\n"),
    "order of sets": ("print(list({'a', 'b', 'c'}) == list({'a', 'b', 'c'}))", "", "True\n"),
    "no time zone": ("import time\nprint(time.tzname[0])", "", "UTC\n"),
}


@pytest.mark.parametrize("layer", EVERY_LAYER)
@pytest.mark.parametrize("program, stdin, expected", SCRIPTS.values(), ids=SCRIPTS)
def test_a_usual_program_runs(program, stdin, expected, layer):
    with Sandbox(program, Limits(time_s=5.0), **LAYERS[layer]) as sandbox:
        outcome = sandbox.script(stdin)
    assert (outcome.stdout, outcome.exit_code, outcome.limit) == (expected, 0, None), outcome


def test_a_program_writes_in_its_folder():
    program = "import tempfile\nopen('a', 'w').write('x')\nprint(open('a').read())\n"
    program += (
        "with tempfile.TemporaryFile('w+') as f:\n    f.write('y'); f.seek(0); print(f.read())"
    )
    with Sandbox(program, LIMITS, isolation="namespaces") as sandbox:
        assert sandbox.script("").stdout == "x\ny\n"


@pytest.mark.parametrize("layer", EVERY_LAYER)
def test_a_program_holds_no_files_but_its_own(layer):
    program = "import os\nfor fd in range(256):\n    try: os.fstat(fd); print(fd)\n"
    program += "    except OSError: pass\nprint(sorted(os.environ))"
    with Sandbox(program, LIMITS, **LAYERS[layer]) as sandbox:
        *files, environment = sandbox.script("").stdout.splitlines()
    assert files == ["0", "1", "2", "3"]  # The last one is for the result of a function.
    assert environment == str(sorted(launching.ENVIRONMENT))


def test_outcomes_are_the_same_every_time():
    program = "print({str(n) for n in range(50)})"
    outputs = set()
    for _ in range(3):
        with Sandbox(program, LIMITS) as sandbox:
            outputs.add(sandbox.script("").stdout)
        launchers.close()
    assert len(outputs) == 1


def test_a_launcher_serves_one_program_after_the_other(monkeypatch):
    mark = mark_launchers(monkeypatch)
    with Sandbox("x = 1\nprint(x)", LIMITS) as sandbox:
        assert sandbox.script("").stdout == "1\n"
    (first,) = processes(mark)
    with Sandbox("print('x' in globals())", LIMITS) as sandbox:
        assert sandbox.script("").stdout == "False\n"
    assert processes(mark) == [first]


def test_a_launcher_that_is_killed_is_an_outcome(monkeypatch):
    mark = mark_launchers(monkeypatch)
    with Sandbox("print(1)", LIMITS) as sandbox:
        for process in processes(mark):
            os.kill(process, 9)
        assert sandbox.script("").limit == "end"
        assert sandbox.script("").limit == "end"
    with Sandbox("print(1)", LIMITS) as sandbox:
        assert sandbox.script("").stdout == "1\n"


def test_without_isolation_programs_are_refused_unless_the_environment_allows_them(monkeypatch):
    started = []

    def refused(program, limits=LIMITS, *, isolation=None):
        started.append(isolation)
        raise Refused(f"{isolation}: unshare: Operation not permitted")

    monkeypatch.setattr(module, "Sandbox", refused)
    monkeypatch.delenv("FIREOPD_UNISOLATED_CODE", raising=False)
    strongest.cache_clear()
    with pytest.raises(UserError, match=r"namespaces: unshare.*FIREOPD_UNISOLATED_CODE=1"):
        strongest()
    monkeypatch.setenv("FIREOPD_UNISOLATED_CODE", "1")
    assert strongest() == "none"
    assert started == ["namespaces", "filters"] * 2
    strongest.cache_clear()


def test_what_cannot_be_confined_is_no_fault_of_the_program():
    with (
        Sandbox("print(1)", dataclasses.replace(LIMITS, time_s=1e30)) as sandbox,
        pytest.raises(RuntimeError, match="could not be confined: OverflowError"),
    ):
        sandbox.script("")


def test_limits_hold_without_isolation_too():
    with Sandbox("while True: pass", LIMITS, isolation="none") as sandbox:
        assert sandbox.script("").limit == "time"
    with Sandbox("x = [0] * 10**9", LIMITS, isolation="none", seccomp=False) as sandbox:
        assert sandbox.script("").error.startswith("MemoryError")


HEADERS = {
    0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("column, header", HEADERS.items(), ids=["x86_64", "aarch64"])
def test_the_numbers_of_system_calls_are_the_kernels(column, header):
    if not header.exists():
        pytest.skip("no headers of the kernel")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    kernel = {name: int(number) for name, number in defined}
    kernel.setdefault("newfstatat", kernel.get("fstatat", -1))
    table = {name: entry[:2] for name, entry in (seccomp.ALWAYS | seccomp.WRITING).items()}
    table |= {name: entry[:2] for name, entry in seccomp.OPENING.items()} | seccomp.SPECIAL
    newer = {"fchmodat2"}  # Than the headers.
    wrong = {
        name: numbers[column]
        for name, numbers in table.items()
        if numbers[column] != kernel.get(name) and name not in newer
    }
    assert wrong == {}
    assert len(table) > 130


def test_a_fork_of_the_trainer_takes_no_launcher(monkeypatch):
    mark = mark_launchers(monkeypatch)
    Sandbox("", LIMITS).close()
    (launcher,) = processes(mark)
    code = multiprocessing.get_context("fork").Process(target=_grade_one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks.
        code.start()
    code.join()
    assert code.exitcode == 0
    assert launcher in processes(mark)
    with Sandbox("print(1)", LIMITS) as sandbox:
        assert sandbox.script("").stdout == "1\n"
    assert processes(mark) == [launcher]


def _grade_one():
    with Sandbox("print(2)", LIMITS) as sandbox:
        assert sandbox.script("").stdout == "2\n"
    launchers.close()
