"""Launchers of sandboxes: processes of the standard library alone, kept for the next program.

take -> ask, read -> give_back | kill
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from fireopd_jax.evaluation.jail import frames

BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from jail.main import main; del sys.path[0];"
    " main()()"
)
OPTIONS = ("-S", "-s", "-P", "-X", "utf8", "-c")
"""No packages, no user's folder, no working folder on the path."""
KEPT = ("LD_LIBRARY_PATH",)
"""Variables without which some installations of Python do not start."""
ENVIRONMENT = {
    **{name: os.environ[name] for name in KEPT if name in os.environ},
    "PYTHONHASHSEED": "0",  # The order of sets, hence a program's output, is the same every time.
    "LC_ALL": "C.UTF-8",
    "HOME": "/program",
    "TMPDIR": "/program",
    "OPENBLAS_NUM_THREADS": "1",
}
"""The whole environment: nothing else of the caller's, which holds secrets."""


END = "end"
"""Message that ends a program, and the reply to it."""


class Launcher:
    """A process that runs one program at a time, and pipes to it."""

    def __init__(self) -> None:
        # No `preexec_fn`: Python between fork and exec is unsafe beside JAX's threads.
        self._process = subprocess.Popen(
            [sys.executable, *OPTIONS, BOOT, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )

    def ask(self, message: Any, seconds: float) -> Any:
        """Send a message and return the next reply; raise frames.Late, frames.Ended."""
        frames.write_frame(_fd(self._process.stdin), message)
        return self.read(seconds)

    def read(self, seconds: float) -> Any:
        """Return the next reply."""
        return frames.read_frame(_fd(self._process.stdout), time.monotonic() + seconds)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended, such as by the system out of memory."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the launcher and its group; in namespaces the rest dies with their pid 1."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._close()

    def disown(self) -> None:
        """Close the pipes in a fork: the launcher ends with the process that started it."""
        self._process.returncode = 0  # Else Python warns of a child that is not ours.
        self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


class Launchers:
    """Launchers that wait for a program."""

    def __init__(self) -> None:
        self._idle: list[Launcher] = []
        self._lock = threading.Lock()

    def take(self) -> Launcher:
        """Return a launcher that no other thread uses."""
        with self._lock:
            while self._idle:
                launcher = self._idle.pop()
                if launcher.alive:
                    return launcher
                launcher.kill()
        return Launcher()

    def give_back(self, launcher: Launcher) -> None:
        """Keep a launcher whose program has ended."""
        with self._lock:
            self._idle.append(launcher)

    def forget(self) -> None:
        """Leave the launchers to the process that started them, in a fork of it."""
        idle = self._idle
        self.__init__()
        for launcher in idle:
            launcher.disown()

    def close(self) -> None:
        """End all launchers that wait."""
        with self._lock:
            idle, self._idle = self._idle, []
        for launcher in idle:
            launcher.kill()


launchers = Launchers()
atexit.register(launchers.close)
os.register_at_fork(after_in_child=launchers.forget)


def _fd(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
