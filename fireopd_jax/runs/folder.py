"""The run folder: who may write where, what is complete, what goes on.

    run.dir or runs/<name> -> lock -> new, resume or complete -> RunFolder

    config.yaml  env.json  metrics.jsonl  completions/  eval/  checkpoints/  logs/  summary.json
    README.md

`config.yaml` makes a folder a run, `summary.json` makes it complete, and a lock of the operating
system on `.lock` says that a live process writes there. Nothing is ever overwritten and nothing is
asked. This module knows nothing of JAX.
"""

import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fireopd_jax.config import UserError
from fireopd_jax.recipe.run import RunConfig

State = Literal["new", "resume", "complete"]

# Keys that change what is shown or kept of a run but not its result: a resumed run may change them.
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
    """An open run: its paths, its state, and the lock that it holds until `close`."""

    def __init__(self, path: Path, state: State, lock: int):
        self.path = path
        self.state: State = state
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
        """Samples of prompts and responses."""
        return self.path / "completions"

    @property
    def evaluation(self) -> Path:
        """Graded responses."""
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        """One folder a step."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """What the run printed."""
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        """The last word of a complete run; absent until then."""
        return self.path / "summary.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    def write_json(self, name: str, data: object) -> None:
        """Write a JSON file of the folder atomically."""
        write_atomically(self.path / name, json.dumps(plain(data), indent=2) + "\n")

    def finish(self, summary: object) -> None:
        """Write summary.json: from here on the run is complete."""
        self.write_json("summary.json", summary)
        self.state = "complete"

    def close(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def is_complete(config: RunConfig) -> bool:
    """Tell whether `run.dir` holds a run that has come to its end."""
    return config.dir is not None and (Path(config.dir).expanduser() / "summary.json").exists()


def open_run(
    config: RunConfig, resolved: Mapping[str, Any], *, root: Path = Path("runs")
) -> RunFolder:
    """Open `run.dir`, or a fresh folder of `root`; `resolved` is the whole configuration."""
    # As it will be read back: tuples are lists in YAML.
    resolved = yaml.safe_load(yaml.safe_dump(dict(resolved)))
    path = _numbered(root, config.name) if config.dir is None else _named(Path(config.dir))
    lock = _lock(path)
    try:
        state = _state(path, config, resolved)
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
    """Make the first free of name, name-2, name-3 ...: mkdir decides races."""
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
    """Make `run.dir`, or accept it when it is a run or empty."""
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
    """Lock the folder for the life of the returned descriptor: the system frees it at any death."""
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


def _state(path: Path, config: RunConfig, resolved: Mapping[str, Any]) -> State:
    file = path / "config.yaml"
    if not file.exists():
        return "new"
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML; expected the configuration of a run") from error
    if different := differences(before, resolved):
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


def differences(before: object, now: object) -> list[str]:
    """Name the dotted keys that differ and change the result, with both values."""
    old, new = _dotted(before), _dotted(now)
    absent = "(absent)"
    return [
        f"{key} was {_shown(old, key, absent)}, is now {_shown(new, key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if key not in INCIDENTAL and _shown(old, key, absent) != _shown(new, key, absent)
    ]


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
    """Let root/latest point to the run, if it lies in root and the filesystem has symlinks."""
    if path.resolve().parent != root.resolve():
        return
    beside = root / f".latest-{os.getpid()}"
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.name)
        beside.replace(root / "latest")
    except OSError:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush to the disk, rename: a reader sees the old file or the new, whole."""
    beside = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Copy `value` for JSON: NumPy becomes Python, a number that is not finite a string.

    That is "nan", "inf" or "-inf"; `float` reads each of them back.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """Describe what the run runs on; the caller names its devices: no JAX is started here."""
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
    """Commit of the checkout that holds the package, if it runs from one."""
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        commit, status = (
            subprocess.run(
                [*git, *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(status)}
