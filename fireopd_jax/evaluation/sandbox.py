"""Run programs that nobody has read: the outside of the sandbox.

    Sandbox(program, limits) -> launcher in a process of its own, isolated -> test -> Outcome

A launcher (`launching.py` starts it, `jail/` is its code) forks a process for the program, which
isolates itself and forks a confined child for every test. What the system offers is found when the
first program runs:

1. `namespaces`: own processes, network, files, users, and a filter of system calls on top.
2. `filters`: seccomp and Landlock, which containers leave to their processes.
3. Neither: programs are refused, unless the environment has FIREOPD_UNISOLATED_CODE=1.

`docs/grading_code.md` lists what each isolates. Nothing of a program is left when `Sandbox` closes.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.jail import codec, frames
from fireopd_jax.evaluation.launching import END, launchers

Isolation = Literal["namespaces", "filters", "none"]
Limit = Literal["time", "output", "end"]
UNISOLATED = "FIREOPD_UNISOLATED_CODE"
GRACE_S = 20.0
"""Time beyond a test's own for the launcher, which keeps the limits itself: start, busy machine."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one test."""

    time_s: float = 6.0
    """Processor time, which does not depend on what else the machine does."""
    clock_s: float = 20.0
    """Time on the clock, for a program that waits."""
    memory_bytes: int = 1 << 30
    """Address space."""
    disk_bytes: int = 64 << 20
    """Files in the program's folder, which lies in memory."""
    output_bytes: int = 8 << 20
    """Standard output, or the result of a function."""
    packages: tuple[str, ...] = ("numpy",)
    """Packages that programs may import beside the standard library, if they are installed."""


DEFAULT = Limits()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened in one test."""

    exit_code: int
    """Negative: the signal that ended the program."""
    limit: Limit | None
    """The limit that was hit; "end": the sandbox itself was ended, as by lack of memory."""
    stdout: str
    """Cut to the limit."""
    stderr: str
    """Its last 4096 bytes."""
    result: str
    """Result of a function, or of assertions, as JSON; empty if there is none."""
    cpu_s: float

    @property
    def error(self) -> str:
        """Last line of the error output."""
        return (self.stderr.strip().splitlines() or [""])[-1][:300]


ENDED = Outcome(exit_code=-9, limit="end", stdout="", stderr="", result="", cpu_s=0.0)


class Refused(Exception):
    """The system does not offer this isolation."""


class Sandbox:
    """One program in processes of its own, for any number of tests."""

    def __init__(
        self,
        program: str,
        limits: Limits = DEFAULT,
        *,
        isolation: Isolation | None = None,
        seccomp: bool = True,
    ):
        """Isolate a process for the program; raise Refused where a named isolation fails.

        `isolation`: one by name; None takes the strongest that this system has. `seccomp`: filter
        system calls where their numbers are known; without, namespaces stand alone.
        """
        self._limits = limits
        orders = {
            "program": program,
            "isolation": isolation or strongest(),
            "seccomp": seccomp,
            "packages": package_folders(limits.packages),
            "resources": {
                "cpu_s": limits.time_s,
                "memory_bytes": limits.memory_bytes,
                "disk_bytes": limits.disk_bytes,
            },
            "clock_s": limits.clock_s,
            "output_bytes": limits.output_bytes,
        }
        self._launcher = launchers.take()
        reply = self._ask(orders, GRACE_S)
        if "ended" in reply or "refused" in reply:
            self.close()
            raise Refused(reply.get("refused", f"{isolation}: the launcher ended"))

    def script(self, stdin: str) -> Outcome:
        """Run the program as a script with a text on its standard input."""
        return self._run({"kind": "script", "stdin": stdin})

    def call(self, function: str, arguments: Sequence[Any]) -> Outcome:
        """Call a function of the program, or of its class `Solution`, with plain values."""
        encoded = [codec.encode(each, codec.no_handle) for each in arguments]
        return self._run({"kind": "call", "function": function, "arguments": encoded})

    def check(self, setup: str, tests: Sequence[str]) -> Outcome:
        """Run assertions about the program's functions, in another process than the program."""
        return self._run({"kind": "check", "setup": setup, "tests": tests})

    def _run(self, request: Mapping[str, Any]) -> Outcome:
        reply = self._ask(request, self._limits.clock_s + GRACE_S)
        if "unconfined" in reply:
            raise RuntimeError(f"a program could not be confined: {reply['unconfined']}")
        return ENDED if "ended" in reply else Outcome(**reply)

    def _ask(self, message: Any, seconds: float) -> Any:
        """Return the reply to a message; {"ended"} if there is none in time."""
        if self._launcher is None:
            return {"ended": True}
        try:
            return self._launcher.ask(message, seconds)
        except (frames.Ended, frames.Late, BrokenPipeError):
            self._launcher.kill()
            self._launcher = None
            return {"ended": True}
        except BaseException:  # An interrupt: the launcher is in the middle of a message.
            self._launcher.kill()
            self._launcher = None
            raise

    def close(self) -> None:
        """End every process of the program."""
        reply: Any = None
        while self._launcher is not None and reply != END:
            reply = self._ask(END, GRACE_S) if reply is None else self._launcher.read(GRACE_S)
        if self._launcher is not None:
            launchers.give_back(self._launcher)
            self._launcher = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def strongest() -> Isolation:
    """Return the strongest isolation of this system; raise UserError where there is none."""
    reasons = []
    for isolation in ("namespaces", "filters"):
        try:
            Sandbox("", isolation=isolation).close()
            return isolation
        except Refused as refused:
            reasons.append(str(refused))
    if os.environ.get(UNISOLATED) == "1":
        return "none"
    raise UserError(
        f"code: this system isolates no programs ({'; '.join(reasons)}), and those of a model may"
        f" do anything; {UNISOLATED}=1 in the environment runs them all the same"
    )


@functools.cache
def package_folders(names: tuple[str, ...]) -> dict[str, str]:
    """Return the folders that hold the installed ones of these packages, by name."""
    found = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            found[name] = os.path.dirname(os.path.realpath(spec.submodule_search_locations[0]))
    return found
