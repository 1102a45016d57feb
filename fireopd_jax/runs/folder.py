"""The run folder: its files, its lock, and whether the run is new, resumed or complete.

    run.dir or runs/<name> -> lock -> new, resume or complete -> RunFolder

    config.yaml  env.json  memory.json  metrics.jsonl  alarms.jsonl  completions/  eval/
    checkpoints/  logs/  summary.json  README.md  report.html

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
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fireopd_jax.config import UserError
from fireopd_jax.recipe.run import RunConfig
from fireopd_jax.runs.changes import Changes, by_keys
from fireopd_jax.runtime.files import plain, write_atomically
from fireopd_jax.runtime.limits import read_yaml
from fireopd_jax.runtime.processes import leads
from fireopd_jax.runtime.yaml_core import dump, load

UNSAFE = re.compile(r"[\[\\\ud800-\udfff]")
"""Orbax takes `[` and a backslash for a pattern, and paths must be UTF-8."""
COMPUTED = ("metrics.jsonl", "checkpoints/*", "eval/*", "completions/*", "rollouts/*",
            "controls/*", "models/*/*")  # fmt: skip
RunState = Literal["new", "resume", "complete"]
Compare = Callable[[Mapping[str, Any], Mapping[str, Any]], Changes]
"""(configuration of the folder, configuration now) -> what has changed."""

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

    def __init__(
        self, path: Path, state: RunState, lock: int | None, changes: Changes | None = None
    ):
        self.path = path
        self.state: RunState = state
        self.changes = changes or Changes()
        """Of the configuration, since the run began."""
        self._lock: int | None = lock
        latest = path.parent / "latest"
        self.latest_before = os.readlink(latest) if latest.is_symlink() else None

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

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

    def discard_unused(self) -> None:
        """Remove a new folder in which nothing has been computed; another one stays."""
        used = any(next(self.path.glob(each), None) for each in COMPUTED)
        if self.state == "new" and leads() and not used:
            shutil.rmtree(self.path, ignore_errors=True)
            latest = self.path.parent / "latest"
            if latest.is_symlink() and not latest.exists():
                latest.unlink()
                if self.latest_before is not None:
                    latest.symlink_to(self.latest_before)

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


def open_run(
    config: RunConfig,
    resolved: Mapping[str, Any],
    *,
    compare: Compare = by_keys,
    root: Path = Path("runs"),
) -> RunFolder:
    """Return `run.dir`, or a new folder in `root`, locked; `resolved` is the whole configuration.

    `compare` judges the differences from the configuration of a run that is there. Those that it
    allows are written to its config.yaml; with more steps a complete run becomes one to resume.

    Raises UserError for a folder that is in use, is not a run, or holds a run of another
    configuration.
    """
    resolved = _as_read_back(resolved)
    _check_place(root / config.name if config.dir is None else Path(config.dir).expanduser())
    path = _numbered(root, config.name) if config.dir is None else _named(Path(config.dir))
    lock = _lock(path)
    try:
        state, changes = _state(path, config, resolved, compare)
        folder = RunFolder(path, state, lock, changes)
        if changes.extended is not None:
            set_aside(path, changes.extended)
        if state == "new" or (state == "resume" and changes.allowed):
            write_atomically(folder.config, dump(resolved))
        if state != "complete":
            for part in (folder.completions, folder.evaluation, folder.checkpoints, folder.logs):
                part.mkdir(exist_ok=True)
            _point_latest(root, path)
    except BaseException:
        os.close(lock)
        raise
    return folder


def state_of(
    config: RunConfig, resolved: Mapping[str, Any], compare: Compare = by_keys
) -> RunState:
    """Return the state in which `open_run` would find the run's folder; nothing is written.

    Raises UserError as `open_run` does, but for a folder that is in use or cannot be written.
    """
    if config.dir is None:
        _check_place(Path("runs", config.name))
        _check_name(Path("runs"), config.name)
        return "new"
    path = Path(config.dir).expanduser()
    _check_place(path)
    if not path.exists():
        return "new"
    try:
        _refuse_foreign(path)
    except OSError as error:
        raise UserError(f"run.dir={path}: not a folder to write in ({error.strerror})") from error
    return _state(path, config, _as_read_back(resolved), compare)[0]


def _check_place(path: Path) -> None:
    """Raise UserError for a path that checkpoints could not be read back from."""
    if found := UNSAFE.search(str(path.absolute())):
        raise UserError(
            f"{path}: checkpoints cannot be read back from a path with {found[0]!r}, and this is "
            f"one: {str(path.absolute())!r}; choose another run.dir"
        )


def _check_name(root: Path, name: str) -> None:
    """Raise UserError for a name that is not that of a folder in `root`."""
    if name in ("", ".", "..", "latest") or Path(name).name != name:
        raise UserError(
            f"run.name={name!r}: expected the plain name of a folder in {root}/, other than"
            " 'latest'; give a path as run.dir"
        )


def _numbered(root: Path, name: str) -> Path:
    """Create the first free of name, name-2, name-3 ...; mkdir is atomic, so races are safe."""
    _check_name(root, name)
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
    path: Path, config: RunConfig, resolved: Mapping[str, Any], compare: Compare
) -> tuple[RunState, Changes]:
    file = path / "config.yaml"
    if not file.exists():
        return "new", Changes()
    try:
        _, before = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not valid YAML; expected the configuration of a run: delete {path}, or write "
            "the file again"
        ) from error
    if not isinstance(before, dict):
        raise UserError(
            f"{file}: empty or no configuration of a run; delete {path}, or write the file again"
        )
    changes = compare(before, resolved)
    if changes.refused:
        raise UserError(changes.refusal(path))
    if (path / "summary.json").exists() and changes.extended is None:
        return "complete", changes
    if config.resume == "never":
        raise UserError(
            f"run.dir={path}: holds an interrupted run and run.resume is 'never'; expected"
            " run.resume=auto, or another run.dir"
        )
    return "resume", changes


def set_aside(path: Path, steps: int) -> None:
    """Rename what a complete run of fewer steps has ended with: `_step_000100` is appended.

    The summary goes first: without it the run is one to resume. May be repeated.
    """
    suffix = f"_step_{steps:06d}"
    models = (path / "models").glob("*/model.json")
    controls = [each.name for each in (path / "controls").glob("*")]
    trained = [each.parent for each in models if each.parent.name in ("student", *controls)]
    graded = [
        file
        for label in ("student_after", *(f"control_{name}" for name in controls))
        for pattern in (f"{label}.json*", f"{label}.*.json*")
        for file in sorted((path / "eval").glob(pattern))
    ]
    others = (path / "summary.json", path / "models" / "student_hf", path / "README.md")
    for old in (others[0], *trained, *graded, *others[1:]):
        stem, dot, rest = old.name.partition(".")
        if old.exists():
            old.rename(old.with_name(f"{stem}{suffix}{dot}{rest}"))


def _as_read_back(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as read from its YAML, in which tuples are lists."""
    return load(dump(dict(tree)))


def _point_latest(root: Path, path: Path) -> None:
    """Point the link root/latest to the run, if it is in root and the filesystem has symlinks."""
    if path.resolve().parent != root.resolve():
        return
    beside = root / f".latest-{os.getpid()}"
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.resolve().name)
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
