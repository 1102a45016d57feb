"""Restriction of files without namespaces (Landlock, Linux 5.13 and later)."""

import ctypes
import os
import struct
from collections.abc import Iterable

from . import linux

CREATE, ADD, RESTRICT = linux.LANDLOCK, linux.LANDLOCK + 1, linux.LANDLOCK + 2
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights to files that a version knows; version 5 is the last that added one."""


def version() -> int:
    """Return the version of Landlock of this kernel; 0 where there is none."""
    try:
        return linux.call("syscall", CREATE, None, 0, 1)
    except OSError:
        return 0


def read_only(folders: Iterable[str]) -> None:
    """Restrict this process to reading below `folders`; it can inspect no other process."""
    rights = (1 << RIGHTS[min(version(), max(RIGHTS))]) - 1
    handled = ctypes.create_string_buffer(struct.pack("Q", rights), 8)
    rules = linux.call("syscall", CREATE, handled, 8, 0)
    for folder in folders:
        opened = os.open(folder, os.O_PATH)
        allowed = READ_FILE | READ_FOLDER if os.path.isdir(folder) else READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, opened), 12)
        linux.call("syscall", ADD, rules, 1, rule, 0)
        os.close(opened)
    linux.prctl(linux.NO_NEW_PRIVILEGES, 1)
    linux.call("syscall", RESTRICT, rules, 0)
    os.close(rules)
