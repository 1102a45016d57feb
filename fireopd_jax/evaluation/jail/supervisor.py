"""Runs confined children and sees to their end: whatever they do, nothing of them remains.

fork -> wire the pipes -> confine -> job | watch: output, time, exit -> kill -> outcome
"""

import dataclasses
import fcntl
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import assertions, namespaces, objects, programs
from .confinement import Confinement

TICK_S, SHORT_TICK_S = 0.02, 0.001
STDERR_BYTES = 4096
PIPE_READS = 17
"""Reads that empty a pipe, which holds at most 1 MiB."""
HIGH = 128
"""First of the numbers of files that no program gets."""
Job = Callable[[], None]


class Forked(BaseException):
    """Unwinds the stack of a child: its job runs at the bottom, where a program has most room."""

    def __init__(self, job: Job):
        self.job = job


class Orphaned(Exception):
    """The process that asked for the run is gone."""


class Unconfined(Exception):
    """A child could not be confined: a fault of the system, not of its program."""


@dataclasses.dataclass
class Capture:
    """What a child writes to one pipe."""

    limit: int
    kills: bool
    """More than `limit` bytes end the child. Otherwise the last ones are kept."""
    data: bytearray = dataclasses.field(default_factory=bytearray)

    def add(self, part: bytes) -> None:
        """Keep no more than one chunk beyond the limit."""
        self.data += part
        if not self.kills:
            del self.data[: -self.limit]

    def exceeded(self) -> bool:
        """Return whether the child wrote more than it may."""
        return self.kills and len(self.data) > self.limit

    def text(self) -> str:
        """Return what was written, cut to the limit."""
        return bytes(self.data[: self.limit]).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Supervisor:
    """Runs the tests of one program, one at a time."""

    program: str
    confinement: Confinement
    packages: Mapping[str, str]
    clock_s: float
    output_bytes: int
    owner: int
    """File descriptor that hangs up when the process that asks for runs is gone."""

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one test of the program; return what happened."""
        if self.confinement.namespaces:
            namespaces.fresh_work_folder(self.confinement.disk_bytes, self.confinement.uid)
        kind = request["kind"]
        if kind == "script":
            return self._single(lambda: programs.run_script(self.program), request["stdin"])
        if kind == "call":
            name, arguments = request["function"], request["arguments"]
            return self._single(lambda: programs.call_function(self.program, name, arguments))
        return self._check(request["setup"], request["tests"])

    def _single(self, job: Job, stdin: str = "") -> dict[str, Any]:
        """Run one child with captured output and a pipe for a result."""
        out, err, result = (os.pipe() for _ in range(3))
        source = _file(stdin)
        child = self._fork(job, [source, out[1], err[1], result[1]])
        _close(source, out[1], err[1], result[1])
        captures = {
            out[0]: Capture(self.output_bytes, kills=True),
            err[0]: Capture(STDERR_BYTES, kills=False),
            result[0]: Capture(self.output_bytes, kills=True),
        }
        ended = self._watch(child, captures)
        return ended | dict(
            zip(("stdout", "stderr", "result"), (c.text() for c in captures.values()), strict=True)
        )

    def _check(self, setup: str, tests: Sequence[str]) -> dict[str, Any]:
        """Run a program in one child and its assertions in another."""
        requests, replies, err, result = (os.pipe() for _ in range(4))
        empty, void = _file(""), os.open("/dev/null", os.O_WRONLY)
        program = self._fork(
            lambda: objects.serve(self.program), [empty, void, err[1], requests[0], replies[1]]
        )
        _close(requests[0], replies[1], err[1])
        judge = self._fork(
            lambda: assertions.check(setup, tests),
            [empty, void, void, requests[1], replies[0], result[1]],
        )
        _close(requests[1], replies[0], result[1], empty, void)
        captures = {
            err[0]: Capture(STDERR_BYTES, kills=False),
            result[0]: Capture(self.output_bytes, kills=True),
        }
        ended = self._watch(judge, captures, program)
        stderr, found = (capture.text() for capture in captures.values())
        return ended | {"stdout": "", "stderr": stderr, "result": found}

    def _fork(self, job: Job, files: Sequence[int]) -> int:
        """Fork a confined child whose file descriptors 0, 1, ... are `files`; return its pid."""
        failed, failure = os.pipe()
        child = os.fork()
        if child:
            os.close(failure)
            with open(failed, encoding="utf-8") as file:
                if message := file.read():  # Returns once the child closed its end.
                    raise Unconfined(message)
            return child
        failure = fcntl.fcntl(failure, fcntl.F_DUPFD, HIGH)
        try:
            self._confine(files, failure)
        except BaseException as error:
            os.write(failure, repr(error).encode())
            os._exit(1)
        os.close(failure)
        raise Forked(lambda: programs.run_and_exit(job))

    def _confine(self, files: Sequence[int], kept: int) -> None:
        """Make a child what it stays: its files and its limits; `kept` remains open."""
        # By way of high numbers: `dup2` would close a file that is still to be copied.
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, HIGH) for file in files]
        for target, file in enumerate(high):
            os.dup2(file, target)
        os.closerange(len(files), kept)
        os.closerange(kept + 1, 1 << 16)
        self.confinement.apply()
        programs.prepare(self.packages)

    def _watch(
        self, child: int, captures: Mapping[int, Capture], helper: int | None = None
    ) -> dict[str, Any]:
        """Wait for a child within its limits, end it and its helper; return exit and limit."""
        status, seconds, limit = self._wait(child, captures, helper)
        slow = seconds > self.confinement.cpu_s
        if helper is not None:
            slow |= _end(helper) > self.confinement.cpu_s
        if self.confinement.namespaces:
            _end_all()
        for fd, capture in captures.items():
            for _ in range(PIPE_READS):
                _read(fd, capture)
            if capture.exceeded():
                limit = "output"
        _close(*captures)
        return {
            "exit_code": os.waitstatus_to_exitcode(status),
            "limit": limit or ("time" if slow else None),
            "cpu_s": seconds,
        }

    def _wait(
        self, child: int, captures: Mapping[int, Capture], helper: int | None
    ) -> tuple[int, float, str | None]:
        """Return status, processor time and limit of a child; kill it at a limit."""
        poll = select.poll()
        poll.register(self.owner, 0)  # Its end alone.
        for fd in captures:
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + self.clock_s
        open_pipes, limit = set(captures), None
        while True:
            left = deadline - time.monotonic()
            # The end of a pipe is nearly always the end of the child.
            tick = TICK_S if len(open_pipes) == len(captures) else SHORT_TICK_S
            for fd, event in poll.poll(max(0.0, min(left, tick)) * 1000):
                if fd == self.owner:
                    for pid in (child, helper):
                        if pid is not None:
                            _end(pid)
                    raise Orphaned(event)
                if not _read(fd, captures[fd]):
                    poll.unregister(fd)
                    open_pipes.remove(fd)
            if any(capture.exceeded() for capture in captures.values()):
                limit = "output"
            elif left <= 0:
                limit = "time"
            if limit:
                os.kill(child, signal.SIGKILL)
            pid, status, usage = os.wait4(child, 0 if limit else os.WNOHANG)
            if pid:
                return status, usage.ru_utime + usage.ru_stime, limit


def _end(pid: int) -> float:
    """Kill a child; return the processor time that it used."""
    os.kill(pid, signal.SIGKILL)
    usage = os.wait4(pid, 0)[2]
    return usage.ru_utime + usage.ru_stime


def _end_all() -> None:
    """Kill everything else in this namespace of processes."""
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _read(fd: int, capture: Capture) -> bool:
    """Read what is there; return whether more may come."""
    try:
        part = os.read(fd, 1 << 16)
    except BlockingIOError:
        return False
    capture.add(part)
    return bool(part)


def _file(text: str) -> int:
    """Return an open file with a text: a program may read it whole, by lines or seek in it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin")
    else:
        import tempfile  # Of systems without `memfd_create`; loads much else.

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    data = memoryview(text.encode("utf-8", "surrogatepass"))
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
