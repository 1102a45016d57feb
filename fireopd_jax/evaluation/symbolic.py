r"""Equality of two formulas by math-verify, in a process of its own with a time limit.

    gold, answer -> is the formula small? -> worker process -> True, False, or None

sympy can take hours or all memory over a short text such as `9^{9^{9^9}}`, and math-verify's own
time-outs work in the main thread only. So formulas that are monstrous on sight are refused, and the
rest run in a worker that is killed and started again when it exceeds the limit.
"""

import atexit
import functools
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError

LIMIT_S = 2.0
"""Seconds of processor time for one comparison."""
PATIENCE_S = 60.0
"""Seconds of the clock after which a worker counts as dead: the limit itself is the worker's."""
MAX_FORMULA = 1000
"""Characters of a formula."""
MAX_WHOLE = 20_000
"""Characters of a whole text; of a longer one the end is compared."""
MAX_DEPTH = 30
"""Nested brackets."""
MAX_EXPONENT = 10_000
"""Largest exponent of a number, and largest factorial."""

HOME = str(Path(__file__).resolve().parents[2])
"""Where the worker finds this package, installed or not."""

BRACKET = re.compile(r"[(\[{}\])]")
TOWER = re.compile(r"\^[\s{(]*(\d+)[\s})]*\^[\s{(]*(\d+)(?=[\s})]*(\^)?)")
EXPONENT = re.compile(r"\^\s*\{?\s*[-+(]*\s*(\d+)")
FACTORIAL = re.compile(r"(?<!\d)(\d+)\s*!")
LONG_NUMBER = re.compile(r"\d{400}")


def symbolic(gold: str, answer: str) -> bool | None:
    """Return whether two formulas are equal; None if they are too large or take too long."""
    if too_large(gold) or too_large(answer):
        return None
    return _cached(gold, answer)


def plain(gold: str, response: str) -> bool | None:
    """Return math-verify's own verdict on a response; None if it does not finish in time."""
    gold, response = gold[-MAX_WHOLE:], response[-MAX_WHOLE:]
    if monstrous(gold) or monstrous(response):
        return None
    return worker().ask(gold=gold, answer=response, whole=True)


def too_large(formula: str) -> bool:
    """Return whether a formula is refused on sight."""
    return len(formula) > MAX_FORMULA or monstrous(formula)


def monstrous(text: str) -> bool:
    r"""Return whether sympy would never finish a text: `10^{10^{10}}`, `99999!`, deep nesting."""
    depth = deepest = 0
    for bracket in BRACKET.findall(text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    numbers = [*EXPONENT.findall(text), *filter(None, FACTORIAL.findall(text))]
    return (
        deepest > MAX_DEPTH
        or any(len(number) > 6 or int(number) > MAX_EXPONENT for number in numbers)
        or re.search(r"!\s*\)*\s*!", text) is not None
        or any(_is_high(*match.groups()) for match in TOWER.finditer(text))
        or LONG_NUMBER.search(text) is not None
    )


def _is_high(first: str, second: str, more: str | None) -> bool:
    return bool(more) or int(second) * len(first) > len(str(MAX_EXPONENT))


class Worker:
    """A process that compares formulas, started when it is first asked, and again after a kill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        atexit.register(self.close)

    def ask(self, *, limit_s: float = LIMIT_S, **request: Any) -> bool | None:
        """Return the worker's answer; None if it took too long, or died of the question."""
        line = json.dumps({"limit_s": limit_s, **request}) + "\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None and process.stdin is not None
            try:
                process.stdin.write(line.encode())
                return self._reply()["equal"]
            except (OSError, TimeoutError):
                self._stop()
                return None
            except BaseException:  # An interrupt: its reply must not answer the next question.
                self._stop()
                raise

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        """Start the process; raise UserError if it cannot import what it needs."""
        self._stop()
        paths = [HOME, *filter(None, [os.environ.get("PYTHONPATH")])]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fireopd_jax.evaluation.symbolic_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for the run: the worker ends with its input.
            )
            self._buffer = b""
            try:
                self._reply()
            except (OSError, TimeoutError):
                self._stop()
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise UserError(
                    f"grading of formulas: math-verify did not start: {reason}"
                ) from None
            except BaseException:
                self._stop()
                raise

    def _reply(self) -> dict[str, Any]:
        """Return the next line; raise TimeoutError, or BrokenPipeError at the process's end."""
        process = self._process
        assert process is not None and process.stdout is not None
        end = time.monotonic() + PATIENCE_S
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            block = os.read(process.stdout.fileno(), 1 << 16)
            if not block:
                raise BrokenPipeError
            self._buffer += block
        reply, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(reply)

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None


@functools.lru_cache(maxsize=1)
def _worker(process: int) -> Worker:
    return Worker()


def worker() -> Worker:
    """Return this process's worker; a forked process has its own."""
    return _worker(os.getpid())


@functools.lru_cache(maxsize=4096)
def _cached(gold: str, answer: str) -> bool | None:
    return worker().ask(gold=gold, answer=answer, whole=False)
