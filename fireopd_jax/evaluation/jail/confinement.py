"""What a forked child gives up before it runs a program: rights, files, memory, time.

limits of resources -> uid or capabilities -> [Landlock] -> seccomp
"""

import dataclasses
import math
import os
import resource
import signal

from . import landlock, linux, namespaces, seccomp

STACK_BYTES = 64 << 20
OPEN_FILES = 64
PROCESSES = 64
"""Threads of one program, where its uid is its own. Without seccomp this also ends fork bombs."""


@dataclasses.dataclass(frozen=True)
class Confinement:
    """How programs are confined: by what the launcher found, and the limits of the caller."""

    namespaces: bool
    """Namespaces are entered: the files that can be reached are the program's own."""
    seccomp: bool
    readable: tuple[str, ...] | None
    """Files and folders that Landlock leaves readable; None without it."""
    uid: int | None
    """Uid to change to; None keeps it."""
    cpu_s: float
    memory_bytes: int
    disk_bytes: int

    def apply(self) -> None:
        """Confine this process; there is no way back."""
        if self.namespaces:
            os.setsid()  # Pid 1 ends whatever leaves the group; elsewhere the group ends it.
        self._limit_resources()
        if linux.LINUX:
            self._drop_rights()
        if self.readable is not None:
            landlock.read_only(self.readable)
        if self.seccomp:
            seccomp.install(own_files=self.namespaces)

    def _limit_resources(self) -> None:
        seconds = math.ceil(self.cpu_s)
        limits = {
            "RLIMIT_CPU": (seconds, seconds + 1),
            "RLIMIT_AS": (self.memory_bytes, self.memory_bytes),
            "RLIMIT_FSIZE": (self.disk_bytes, self.disk_bytes),
            "RLIMIT_NOFILE": (OPEN_FILES, OPEN_FILES),
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_STACK": (STACK_BYTES, STACK_BYTES),
            "RLIMIT_MEMLOCK": (0, 0),
            "RLIMIT_MSGQUEUE": (0, 0),
        }
        if not linux.LINUX:
            del limits["RLIMIT_AS"]  # macOS refuses it.
        if self.uid is not None and self.uid != namespaces.NOBODY:
            limits["RLIMIT_NPROC"] = (PROCESSES, PROCESSES)
        for name, (soft, hard) in limits.items():
            if (which := getattr(resource, name, None)) is not None:
                ceiling = resource.getrlimit(which)[1]
                if ceiling != resource.RLIM_INFINITY:
                    soft, hard = min(soft, ceiling), min(hard, ceiling)
                resource.setrlimit(which, (soft, hard))

    def _drop_rights(self) -> None:
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        linux.drop_capabilities()
        linux.prctl(linux.SET_DUMPABLE, 0)
        linux.prctl(linux.PARENT_DEATH_SIGNAL, signal.SIGKILL)
        linux.prctl(linux.NO_NEW_PRIVILEGES, 1)
