"""The files of a run as a report reads them: what is missing or damaged is noted, never an error.

    runs/x -> RunFiles: configuration, environment, summary, metrics, completions, notes

A run may still go on, may have been cut off in the middle of a line, or be of an older version.
This module does not import JAX.
"""

import dataclasses
import fcntl
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import yaml

from fireopd_jax.runs.finding import find_run
from fireopd_jax.runtime.limits import read_json, read_yaml

State = Literal["complete", "running", "stopped"]
MAIN = "student"
"""Name of the student among those that were trained; the others are controls."""


@dataclasses.dataclass(frozen=True)
class Series:
    """The values of a metric, in the order of the file."""

    steps: array
    values: array


class RunFiles:
    """The files of a run; `notes` say what is missing, damaged or older."""

    def __init__(self, path: Path, *, live: bool | None = None):
        self.path = path
        self.notes: list[str] = []
        self.config = self._config()
        self.environment = self.read_object("env.json", "the command and the machine are unknown")
        self.summary = self.read_object("summary.json")
        self.memory = self.read_object("memory.json")
        if self.summary:
            self.state: State = "complete"
        else:
            live = in_use(path) if live is None else live
            self.state = "running" if live else "stopped"

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.path.resolve().name

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the configuration, such as `method.filter.kind`."""
        found: Any = self.config
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def homes(self) -> dict[str, Path]:
        """Return the folder of metrics and completions of the student and of each control."""
        controls = sorted(path for path in (self.path / "controls").glob("*") if path.is_dir())
        return {MAIN: self.path} | {path.name: path for path in controls}

    def metrics(self, name: str) -> dict[str, Series]:
        """Return the metrics of the student, or a control, by their names."""
        found: dict[str, Series] = {}
        for line in self._lines(self.homes()[name] / "metrics.jsonl"):
            step = line.get("step")
            if not isinstance(step, int):
                continue
            for key, value in line.items():
                if key == "step" or (number := _number(value)) is None:
                    continue
                series = found.setdefault(key, Series(array("q"), array("d")))
                series.steps.append(step)
                series.values.append(number)
        return found

    def alarms(self, name: str) -> list[dict[str, Any]]:
        """Return the alarms of the student, or a control, each once; [] where none was recorded."""
        found: dict[tuple[Any, Any], dict[str, Any]] = {}
        file = self.homes()[name] / "alarms.jsonl"
        for line in self._lines(file) if file.exists() else ():
            if isinstance(line.get("step"), int) and isinstance(line.get("text"), str):
                found[line["step"], line.get("rule")] = line
        return [found[key] for key in sorted(found, key=lambda key: key[0])]

    def completions(self, name: str = MAIN) -> list[Path]:
        """Return the files of saved trajectories, by step."""
        return sorted((self.homes()[name] / "completions").glob("step_*.parquet"))

    def table(self, file: Path, columns: Sequence[str]) -> pyarrow.Table | None:
        """Return those of the columns that a file of trajectories has; None if it is damaged."""
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                known = set(parquet.schema_arrow.names)
                return parquet.read([name for name in columns if name in known])
        except (OSError, pyarrow.ArrowException):
            self.note(f"{file.relative_to(self.path)} is damaged and left out")
            return None

    def read_object(self, name: str, without: str = "") -> dict[str, Any]:
        """Return the object of a JSON file; {} if there is none, noted if `without` says why."""
        if not (self.path / name).exists():
            if without:
                self.note(f"{name} is missing: {without}")
            return {}
        try:
            found = read_json(self.path / name)
        except (OSError, ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return found
        self.note(f"{name} is damaged and left out")
        return {}

    def note(self, text: str) -> None:
        """Add a line on what is missing, once."""
        if text not in self.notes:
            self.notes.append(text)

    def _config(self) -> Mapping[str, Any]:
        try:
            _, found = read_yaml((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            found = None
        if isinstance(found, Mapping):
            return found
        self.note("config.yaml is damaged: the method and its settings are unknown")
        return {}

    def _lines(self, file: Path) -> Iterator[dict[str, Any]]:
        """Yield the objects in the lines of a file; a cut line is left out."""
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    try:
                        found = json.loads(line)
                    except (ValueError, RecursionError):
                        self.note(f"{file.relative_to(self.path)} has a damaged line, left out")
                        continue
                    if isinstance(found, dict):
                        yield found
        except OSError:
            self.note(f"{file.relative_to(self.path)} is missing: there are no curves")


def open_run(run: str, *, live: bool | None = None) -> RunFiles:
    """Return the files of a run; raise UserError, with the nearest run, for another path.

    `live` is whether a process works on it, which is found out by default.
    """
    return RunFiles(find_run(run, "report"), live=live)


def in_use(path: Path) -> bool:
    """Return whether a live process holds the lock of a run."""
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _number(value: Any) -> float | None:
    """Return a number of metrics.jsonl, in which "nan" and "inf" are texts; None for another."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
        return float(value)
    return None
