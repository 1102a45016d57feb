"""The run folder: its files, its lock, and whether the run is new, resumed or complete.

    run.dir or runs/<name> -> lock -> new, resume or complete -> RunFolder

    config.yaml  env.json  metrics.jsonl  completions/  eval/  checkpoints/  logs/  summary.json
    README.md

A folder with `config.yaml` is a run, one with `summary.json` a complete run; a live process that
writes to it holds a lock of the operating system on `.lock`. Files of another run are never
overwritten. This module does not import JAX.
"""

import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fireopd_jax.config import UserError
from fireopd_jax.recipe.run import RunConfig
from fireopd_jax.runtime.files import plain, write_atomically

RunState = Literal["new", "resume", "complete"]
Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]

# Keys that change what is logged or kept of a run, not its result: a resumed run may change them.
INCIDENTAL = frozenset(
    {
        "run.name",
        "run.dir",
        "run.resume",
        "run.save_every",
        "run.keep",
        "run.keep_best",
        "run.log_every",
        "run.completions_every",
        "run.export",
    }
)
OF_SERVED = re.compile(
    r"teachers\..+\.served\.("
    "api_key_env|concurrency|timeout_s|retries|backoff_s|tolerance|cache|cache_file"
    "|max_tokens_budget|max_cost|price_per_million_(in|out)put)"
)
"""The same of teachers over HTTP: a run whose budget is spent goes on with a larger one."""
SHOWN_DIFFERENCES = 8
PACKAGES = (
    "fireopd-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "datasets",
    "numpy",
)


class RunFolder:
    """The folder of a run: its paths, its state, and a lock that is held until `close`."""

    def __init__(self, path: Path, state: RunState, lock: int):
        self.path = path
        self.state: RunState = state
        self._lock: int | None = lock

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine and commit."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """Prompts and responses of some steps."""
        return self.path / "completions"

    @property
    def evaluation(self) -> Path:
        """Graded responses."""
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        """One folder per saved step."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Log lines of the run."""
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        """Results of the run; written at its end, and so the mark of a complete run."""
        return self.path / "summary.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    def write_json(self, name: str, data: object) -> None:
        """Write `data` atomically as a JSON file in the folder."""
        write_atomically(self.path / name, json.dumps(plain(data), indent=2) + "\n")

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.close()


def is_complete(config: RunConfig) -> bool:
    """Return whether `run.dir` holds a complete run."""
    return config.dir is not None and (Path(config.dir).expanduser() / "summary.json").exists()


def open_run(
    config: RunConfig,
    resolved: Mapping[str, Any],
    *,
    complete: Complete = dict,
    root: Path = Path("runs"),
) -> RunFolder:
    """Return `run.dir`, or a new folder in `root`, locked; `resolved` is the whole configuration.

    `complete` adds defaults for keys that the configuration of an older run lacks.

    Raises UserError for a folder that is in use, is not a run, or holds a run of another
    configuration.
    """
    resolved = _as_read_back(resolved)
    path = _numbered(root, config.name) if config.dir is None else _named(Path(config.dir))
    lock = _lock(path)
    try:
        state = _state(path, config, resolved, complete)
        folder = RunFolder(path, state, lock)
        if state == "new":
            write_atomically(folder.config, yaml.safe_dump(resolved, sort_keys=False))
        if state != "complete":
            for part in (folder.completions, folder.evaluation, folder.checkpoints, folder.logs):
                part.mkdir(exist_ok=True)
            _point_latest(root, path)
    except BaseException:
        os.close(lock)
        raise
    return folder


def _numbered(root: Path, name: str) -> Path:
    """Create the first free of name, name-2, name-3 ...; mkdir is atomic, so races are safe."""
    if name in ("", ".", "..", "latest") or Path(name).name != name:
        raise UserError(
            f"run.name={name!r}: expected the plain name of a folder in {root}/, other than"
            " 'latest'; give a path as run.dir"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = root / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise UserError(f"{root}: cannot make a run folder there ({error.strerror})") from error
    raise AssertionError("unreachable")


def _named(path: Path) -> Path:
    """Create `run.dir` if missing; raise UserError if it is neither a run nor empty."""
    path = path.expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(path)
    except OSError as error:
        raise UserError(f"run.dir={path}: not a folder to write in ({error.strerror})") from error
    return path


def _refuse_foreign(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    # A process killed at its very start leaves only these.
    foreign = {name for name in names if name != ".lock" and not name.startswith(".writing-")}
    if foreign and "config.yaml" not in names:
        raise UserError(
            f"run.dir={path}: the folder holds {min(foreign)!r} but no config.yaml, so it is not"
            " a run; expected a new or an empty folder"
        )


def _lock(path: Path) -> int:
    """Return a descriptor that locks the folder until it is closed or the process ends."""
    try:
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"{path}: in use by a live process (pid {owner}); wait for it, or choose another"
            " run.dir"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _state(
    path: Path, config: RunConfig, resolved: Mapping[str, Any], complete: Complete
) -> RunState:
    file = path / "config.yaml"
    if not file.exists():
        return "new"
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML; expected the configuration of a run") from error
    if different := differences(_as_read_back(complete(before)), resolved):
        shown = "; ".join(different[:SHOWN_DIFFERENCES])
        more = len(different) - SHOWN_DIFFERENCES
        raise UserError(
            f"run.dir={path}: the folder holds a run of another configuration: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Choose another run.dir, or run with the same configuration"
        )
    if (path / "summary.json").exists():
        return "complete"
    if config.resume == "never":
        raise UserError(
            f"run.dir={path}: holds an interrupted run and run.resume is 'never'; expected"
            " run.resume=auto, or another run.dir"
        )
    return "resume"


def _as_read_back(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as read from its YAML, in which tuples are lists."""
    return yaml.safe_load(yaml.safe_dump(dict(tree)))


def differences(before: object, now: object) -> list[str]:
    """Return, with both values, the dotted keys that differ and may change the result."""
    old, new = _dotted(before), _dotted(now)
    absent = "(absent)"
    return [
        f"{key} was {_shown(old, key, absent)}, is now {_shown(new, key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if not _is_incidental(key) and _shown(old, key, absent) != _shown(new, key, absent)
    ]


def _is_incidental(key: str) -> bool:
    return key in INCIDENTAL or OF_SERVED.fullmatch(key) is not None


def _dotted(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(flat: Mapping[str, object], key: str, absent: str) -> str:
    # By text, so that NaN equals itself and true is not 1.
    return repr(flat[key]) if key in flat else absent


def _point_latest(root: Path, path: Path) -> None:
    """Point the link root/latest to the run, if it is in root and the filesystem has symlinks."""
    if path.resolve().parent != root.resolve():
        return
    beside = root / f".latest-{os.getpid()}"
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.name)
        beside.replace(root / "latest")
    except OSError:
        beside.unlink(missing_ok=True)


def environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """Return versions, machine, commit and command; the caller lists the devices (no JAX here)."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "devices": list(devices),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(Path(__file__).resolve().parent.parent.parent),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(checkout: Path) -> dict[str, Any] | None:
    """Return commit and whether files changed, if the package runs from a checkout."""
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        commit, status = (
            subprocess.run(
                [*git, *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(status)}
