"""The memory of devices: of a machine, of a container's limit, as the user says; its release."""

import ctypes
import os
import sys
from pathlib import Path

import jax
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.runtime import compilation, memory
from fireopd_jax.runtime.memory import (
    GIB,
    Memory,
    device_memory,
    machine_memory,
    release_freed,
)

MEMINFO = "MemTotal: 33554432 kB\nMemFree: 1024 kB\nMemAvailable: 16777216 kB\n"


def system(root, cgroup, **files):
    """Write a system's files below `root`."""
    texts = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup} | files
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_without_limits_has_what_is_available(tmp_path):
    assert machine_memory(system(tmp_path, "0::/\n")) == Memory(16 * GIB, 32 * GIB)


def test_a_container_has_what_its_limit_leaves_without_the_cache(tmp_path):
    inner = "sys/fs/cgroup/job"
    files = {
        f"{inner}/memory.max": f"{8 * GIB}\n",
        f"{inner}/memory.current": f"{5 * GIB}\n",
        f"{inner}/memory.stat": f"anon {3 * GIB}\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    assert machine_memory(system(tmp_path, "0::/job/step\n", **files)) == Memory(5 * GIB, 8 * GIB)


def test_limits_of_the_first_version_of_cgroups_count(tmp_path):
    folder = "sys/fs/cgroup/memory"
    files = {
        f"{folder}/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{GIB}\n",
    }
    groups = "4:memory:/docker/abc\n1:cpu:/\n0::/\n"
    assert machine_memory(system(tmp_path, groups, **files)) == Memory(3 * GIB, 4 * GIB)


def test_the_user_may_state_the_memory(monkeypatch):
    monkeypatch.setenv("FIREOPD_MEMORY_GIB", "1.5")
    assert device_memory(jax.devices()) == Memory(3 * GIB // 2, 3 * GIB // 2)


def test_cpu_devices_share_the_memory_of_the_machine():
    one, all_of_them = (device_memory(jax.devices()[:n]) for n in (1, 8))
    assert one.total // 8 == all_of_them.total


@pytest.mark.parametrize("value", ["much", "0", "-3", "inf", "nan"])
def test_a_memory_that_is_no_size_is_refused(monkeypatch, value):
    monkeypatch.setenv("FIREOPD_MEMORY_GIB", value)
    with pytest.raises(UserError, match=f"FIREOPD_MEMORY_GIB={value}: expected the GiB"):
        device_memory(jax.devices())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_freed_memory_is_returned_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if memory._malloc_trim() is None:
        pytest.skip("another C library than glibc")
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    pieces = [libc.malloc(60_000) for _ in range(4_000)]  # below the size that is mapped by itself
    for piece in pieces:
        ctypes.memset(piece, 1, 60_000)
    kept = pieces[::10]  # between the holes, which `free` does not return
    for index, piece in enumerate(pieces):
        if index % 10:
            libc.free(piece)
    before = resident()
    release_freed()
    assert before - resident() > 150 * 2**20
    for piece in kept:
        libc.free(piece)


def test_long_compilations_are_followed_by_a_release(monkeypatch):
    released = []
    monkeypatch.setattr(compilation, "release_freed", lambda: released.append(True))
    total = compilation._Total()
    total(compilation.BACKEND_COMPILE, 0.1)
    total("/jax/other", 9.0)
    assert (total.count, released) == (1, [])
    total(compilation.BACKEND_COMPILE, 2.0)
    assert (total.count, released) == (2, [True])
