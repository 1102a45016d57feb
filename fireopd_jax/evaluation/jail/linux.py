"""Calls of Linux that Python 3.11 has no functions for, through libc."""

import ctypes
import os
import sys
from typing import Any

LINUX = sys.platform == "linux"
MACHINE = os.uname().machine if os.uname().machine in ("x86_64", "aarch64") else None
"""Architecture whose system calls are known by number; None for every other."""

# unshare(2)
NEW_MOUNTS, NEW_HOSTNAME, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USERS, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
# mount(2)
READ_ONLY, NO_SETUID, NO_DEVICES, BIND = 1, 2, 4, 4096
RECURSIVE, PRIVATE = 16384, 1 << 18
DETACH = 2
# prctl(2)
PARENT_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 22, 38
FILTER = 2

MOUNT_SETATTR = 442  # on every architecture, from Linux 5.12 on
LANDLOCK = 444  # create, add a rule, restrict: 444, 445, 446 on every architecture

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(name: str, *arguments: Any) -> int:
    """Call a function of libc; raise OSError where it fails."""
    # Integers as longs: a variadic function reads whole registers.
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(_libc, name)(*converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def prctl(option: int, value: Any = 0, more: Any = 0) -> None:
    """Set an attribute of this process."""
    call("prctl", option, value, more, 0, 0)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount a file system, or bind a folder or file to another place."""
    kind_ = kind.encode() if kind else None
    call("mount", source.encode(), target.encode(), kind_, flags, options.encode() or None)


def make_read_only(target: str, *, recursive: bool) -> None:
    """Make a mount, and those below it, read-only and without setuid."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID, 0, 0, 0)  # set, clear, -, -
    here, below = -100, 0x8000 if recursive else 0
    size = ctypes.sizeof(attributes)
    call("syscall", MOUNT_SETATTR, here, target.encode(), below, ctypes.byref(attributes), size)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_capabilities() -> None:
    """Drop every capability of this process, for good."""
    header = _CapabilityHeader(0x20080522, 0)  # version 3: two words for each of three sets
    call("capset", ctypes.byref(header), (ctypes.c_uint32 * 6)())
