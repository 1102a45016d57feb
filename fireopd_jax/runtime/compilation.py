"""JAX's persistent compilation cache, a counter of compilations, and what they leave in memory.

    jit -> compile, or read from the cache -> CompileCounter.count, memory released

A program that is loaded from the disk cache counts too: it was new to this process.
"""

import functools
import logging
import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from fireopd_jax.runtime.memory import release_freed

log = logging.getLogger(__name__)

# JAX records this event for every backend compile, also when the persistent cache has the program.
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
LONG_S = 0.5
"""Compilations that take longer leave memory behind: a quarter of a GiB in a minute of them."""


def cache_folder() -> Path:
    """Return `$FIREOPD_CACHE_DIR`, else `fireopd_jax` in the user's cache folder.

    A user without a home has one in the folder for temporary files.
    """
    if folder := os.environ.get("FIREOPD_CACHE_DIR"):
        return Path(folder).expanduser()
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no HOME, and no entry of the user id in the system's list of users
        base = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return base / "fireopd_jax"


def compile_cache(enabled: bool = True, folder: Path | None = None) -> Path | None:
    """Turn JAX's persistent compilation cache on or off; return the folder it uses.

    Without a folder that can be written to it is off, with a warning. From now on the memory that
    compilations leave behind is released.
    """
    release_after_compilations()
    where = _writable(folder or cache_folder() / "xla") if enabled else None
    enabled = where is not None
    jax.config.update("jax_enable_compilation_cache", enabled)
    jax.config.update("jax_compilation_cache_dir", None if where is None else str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX opens its cache at the first compile and ignores these options after it, unless reset.
    reset_cache()
    return where


def _writable(folder: Path) -> Path | None:
    """Return the folder, made if it is missing; warn and return None if it takes no files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"x")
    except OSError as error:
        log.warning(
            f"{folder}: cannot be written ({error.strerror}): programs are compiled without a "
            "cache; FIREOPD_CACHE_DIR names another folder"
        )
        return None
    return folder


class _Total:
    def __init__(self):
        self.count = 0

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == BACKEND_COMPILE:
            self.count += 1
            if duration_secs > LONG_S:
                release_freed()


@functools.cache
def _total() -> _Total:
    """Return the process's only listener: JAX never removes a registered listener."""
    total = _Total()
    jax.monitoring.register_event_duration_secs_listener(total)
    return total


def release_after_compilations() -> None:
    """Release the memory that long compilations leave behind, after each of them from now on."""
    _total()


class CompileCounter:
    """Number of backend compilations since this counter was created."""

    def __init__(self):
        self._total = _total()
        self._start = self._total.count

    @property
    def count(self) -> int:
        """Number of programs compiled, or loaded from the cache, so far."""
        return self._total.count - self._start
