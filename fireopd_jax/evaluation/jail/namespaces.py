"""Namespaces of Linux: own processes, own network without a device, own files, own users.

    unshare -> new root of read-only system folders and a small tmpfs -> pivot_root -> fork: pid 1

The new root exists in memory and in these namespaces only. It disappears with the last process,
and all processes die with pid 1: nothing is left to remove.
"""

import os
import signal
import stat
import sys
import sysconfig
from collections.abc import Mapping, Sequence

from . import linux

WORK = "/program"
"""The folder of the program, the only place it can write; no environment lies below such a name."""
INERT = linux.NO_SETUID | linux.NO_DEVICES
SPARE_ID = 1_900_000_000
"""First of the user ids that systemd's list of ranges leaves unused."""
NOBODY = 65534
SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
PACKAGE_FOLDERS = ("site-packages", "dist-packages", "python3/dist-packages")
DEVICES = tuple(
    path
    for path in ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
    if os.path.exists(path)
)


def python_folders() -> list[str]:
    """Return the folders that this Python and the shared libraries of its modules are read from."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    paths |= {os.path.join(sys.base_prefix, "lib")} if sys.base_prefix != "/usr" else set()
    found = [os.path.realpath(path) for path in (*SYSTEM_FOLDERS, *sorted(paths))]
    return [path for path in dict.fromkeys(found) if os.path.isdir(path)]


def package_folders(packages: Mapping[str, str]) -> list[str]:
    """Return the folders of packages (name -> parent folder) and of their shared libraries."""
    paths = [os.path.join(parent, name) for name, parent in packages.items()]
    return [path for each in paths for path in (each, f"{each}.libs") if os.path.isdir(path)]


def enter(readable: Sequence[str]) -> int | None:
    """Move into new namespaces and become their pid 1; return the uid for programs.

    `readable`: the folders that exist in there, in the order in which they may cover each other.
    None: programs keep the uid that they have. Raises OSError where the system refuses. The caller
    continues in the child; the parent waits in here and exits with it.
    """
    uid = _unshare(
        linux.NEW_MOUNTS | linux.NEW_HOSTNAME | linux.NEW_IPC | linux.NEW_PIDS | linux.NEW_NETWORK
    )
    _build_root(readable)
    _become_first()
    return uid


def _unshare(new: int) -> int | None:
    """Create the namespaces, as root directly, as anybody else inside new users."""
    if os.geteuid() == 0:
        spare = _spare_uid()
        try:
            linux.call("unshare", new)
            return spare
        except PermissionError:
            pass  # Root of a container, without CAP_SYS_ADMIN.
    uid, gid = os.geteuid(), os.getegid()
    linux.call("unshare", new | linux.NEW_USERS)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {uid} 1"),
        ("gid_map", f"{NOBODY} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    return None


def _spare_uid() -> int | None:
    """Return a uid that nothing else has, else nobody's; None where a container has neither."""
    with open("/proc/self/setgroups") as file:
        if file.read().strip() == "deny":  # Groups cannot be left.
            return None
    for uid in (SPARE_ID + os.getpid(), NOBODY):
        if _mapped(uid, "uid_map") and _mapped(uid, "gid_map"):
            return uid
    return None


def _mapped(number: int, file_name: str) -> bool:
    """Return whether a uid or gid exists in the namespace of users that we are in."""
    with open(f"/proc/self/{file_name}") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def _build_root(readable: Sequence[str]) -> None:
    """Make a root of these folders and of devices, read-only, and pivot into it."""
    linux.mount("none", "/", None, linux.RECURSIVE | linux.PRIVATE)
    # Opened before the new root covers its mount point: Python itself may lie below that.
    opened = {path: os.open(path, os.O_RDONLY) for path in (*readable, *DEVICES)}
    root = "/tmp"  # A folder of every system, covered in these namespaces only.
    linux.mount("tmpfs", root, "tmpfs", INERT, "size=1m,nr_inodes=4k,mode=755")
    covers: list[str] = []
    for path, handle in opened.items():
        _bind(handle, root + path)
        covers += _cover_packages(root + path)
    for cover in covers:
        linux.make_read_only(cover, recursive=False)
    for path in SYSTEM_FOLDERS:
        if os.path.islink(path) and not os.path.lexists(root + path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.path.realpath(path), root + path)
    os.mkdir(root + WORK)
    os.chdir(root)
    linux.call("pivot_root", b".", b".")
    linux.call("umount2", b".", linux.DETACH)
    linux.make_read_only("/", recursive=False)


def _cover_packages(folder: str) -> list[str]:
    """Hide the user's packages (JAX, its native code) below a folder; return what covers them."""
    covers = [os.path.join(folder, name) for name in PACKAGE_FOLDERS]
    covers = [cover for cover in covers if os.path.isdir(cover)]
    for cover in covers:
        linux.mount("tmpfs", cover, "tmpfs", INERT, "size=64k,mode=755")
    return covers


def _bind(handle: int, target: str) -> None:
    """Bind an open file or folder, and what is mounted below it, read-only to `target`."""
    folder = stat.S_ISDIR(os.fstat(handle).st_mode)
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    linux.mount(f"/proc/self/fd/{handle}", target, None, linux.BIND | linux.RECURSIVE)
    linux.make_read_only(target, recursive=True)
    os.close(handle)


def fresh_work_folder(disk_bytes: int, uid: int | None) -> None:
    """Replace the folder of the program by an empty one of at most `disk_bytes`."""
    os.chdir("/")
    if os.path.ismount(WORK):
        linux.call("umount2", WORK.encode(), linux.DETACH)
    owner = "" if uid is None else f",uid={uid},gid={uid}"
    options = f"size={disk_bytes},nr_inodes=4k,mode=700{owner}"
    linux.mount("tmpfs", WORK, "tmpfs", INERT, options)
    os.chdir(WORK)


def _become_first() -> None:
    """Return in a child that is pid 1 of the new namespace and dies with its parent."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(1 if status else 0)
    linux.prctl(linux.PARENT_DEATH_SIGNAL, signal.SIGKILL)
