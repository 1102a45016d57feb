"""Filter of system calls (seccomp), by a list of what is allowed.

    rules -> program of the kernel's packet filter -> prctl

A program gets threads, files that it opens itself, timers and pipes. It gets no new process, no
program in its place, no socket (but a connected pair), no signal to others, no shared memory, no
attribute of another process, nothing newer than this list. What is not allowed is an error of
permission in the program, not its end.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from . import linux

# Name: number on x86_64, on aarch64. None: does not exist there.
ALWAYS = {
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "preadv": (295, 69),
    "preadv2": (327, 286), "write": (1, 64), "writev": (20, 66), "pwrite64": (18, 68),
    "pwritev": (296, 70), "pwritev2": (328, 287), "close": (3, 57), "close_range": (436, 436),
    "lseek": (8, 62), "fstat": (5, 80), "stat": (4, None), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "getdents": (78, None), "getdents64": (217, 61),
    "statfs": (137, 43), "fstatfs": (138, 44), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd2": (290, 19),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "fadvise64": (221, 223),
    "sendfile": (40, 71), "socketpair": (53, 199), "recvfrom": (45, 207), "shutdown": (48, 210),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "mincore": (27, 232), "msync": (26, 227), "brk": (12, 214),
    "membarrier": (324, 283), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None),
    "restart_syscall": (219, 128), "alarm": (37, None), "getitimer": (36, 102),
    "setitimer": (38, 103), "timer_create": (222, 107), "timer_settime": (223, 110),
    "timer_gettime": (224, 108), "timer_getoverrun": (225, 109), "timer_delete": (226, 111),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgrp": (111, None),
    "getpgid": (121, 155), "getsid": (124, 156), "uname": (63, 160), "sysinfo": (99, 179),
    "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164), "getcpu": (309, 168),
    "umask": (95, 166), "getrandom": (318, 278), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "arch_prctl": (158, None), "exit": (60, 93),
    "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95),
}  # fmt: skip

OPENING = {"open": (2, None, 1), "openat": (257, 56, 2)}
"""Calls that open files, and which of their arguments holds the flags."""

WRITING = {
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "utimensat": (280, 88), "utimes": (235, None), "utime": (132, None),
    "futimesat": (261, None), "copy_file_range": (326, 285),
}  # fmt: skip
"""Calls that change files: only where every file that can be reached is the program's own."""

SPECIAL = {
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131),
    "prlimit64": (302, 261), "prctl": (157, 167), "fcntl": (72, 25), "ioctl": (16, 29),
    "sendto": (44, 206),
}  # fmt: skip
"""Calls that depend on their arguments."""

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD = 0x00010000
SET_NAME = 15  # of prctl
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""Duplicates, flags, locks, the size of a pipe. Not F_SETOWN and F_SETSIG: they send signals."""
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, how wide, how much can be read, blocking, close-on-exec."""

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # instructions of the packet filter
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


def available() -> bool:
    """Return whether the numbers of the system calls are known here."""
    return linux.LINUX and linux.MACHINE is not None


def install(*, own_files: bool) -> None:
    """Filter the system calls of this process from now on; OSError where the system refuses.

    `own_files`: files may be created and written.
    """
    linux.prctl(linux.NO_NEW_PRIVILEGES, 1)
    code = b"".join(struct.pack("HBBI", *each) for each in program(own_files, os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filter_ = Program(len(code) // 8, ctypes.addressof(buffer))
    linux.prctl(linux.SET_SECCOMP, linux.FILTER, ctypes.byref(filter_))


def program(own_files: bool, pid: int) -> list[Instruction]:
    """Return the filter for a process with this pid."""
    column = {"x86_64": 0, "aarch64": 1}[linux.MACHINE or ""]
    refuse = REFUSE | errno.EPERM
    plain = {**ALWAYS, **(WRITING if own_files else {})}
    code: list[Instruction] = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, ARCHITECTURE[linux.MACHINE or ""]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
    ]
    for numbers in plain.values():
        if (number := numbers[column]) is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for *numbers, flags in OPENING.values():
        if (number := numbers[column]) is not None:
            code += _branch(number, _allowed() if own_files else _no_bit(flags, WRITE_FLAGS))
    rules = {
        "clone": [*_load(0), (ANY_BIT, 0, 1, CLONE_THREAD), *_allowed()],
        "clone3": [(RETURN, 0, 0, REFUSE | errno.ENOSYS)],  # libc then takes clone
        "kill": _one_of(0, [pid]),
        "tgkill": _one_of(0, [pid]),
        "prlimit64": _one_of(0, [0, pid]),
        "prctl": _one_of(0, [SET_NAME]),
        "fcntl": _one_of(1, FCNTL),
        "ioctl": _one_of(1, IOCTL),
        "sendto": _null(4),  # no address
    }
    for name, rule in rules.items():
        code += _branch(SPECIAL[name][column], rule)
    return [*code, (RETURN, 0, 0, refuse)]


def _branch(number: int, rule: list[Instruction]) -> list[Instruction]:
    """Apply a rule to one system call; a rule that decides nothing refuses."""
    rule = [*rule, (RETURN, 0, 0, REFUSE | errno.EPERM)]
    return [(EQUAL, 0, len(rule), number), *rule]


def _load(argument: int, high: bool = False) -> list[Instruction]:
    return [(LOAD, 0, 0, 16 + 8 * argument + 4 * high)]


def _allowed() -> list[Instruction]:
    return [(RETURN, 0, 0, ALLOW)]


def _one_of(argument: int, values: Iterable[int]) -> list[Instruction]:
    """Allow these values of an argument of 32 bits."""
    tests = [part for value in values for part in ((EQUAL, 0, 1, value), *_allowed())]
    return [*_load(argument), *tests]


def _no_bit(argument: int, bits: int) -> list[Instruction]:
    return [*_load(argument), (ANY_BIT, 1, 0, bits), *_allowed()]


def _null(argument: int) -> list[Instruction]:
    """Allow a null pointer, both of whose halves are zero."""
    high = [*_load(argument, high=True), (EQUAL, 0, 1, 0), *_allowed()]
    return [*_load(argument), (EQUAL, 0, len(high), 0), *high]
