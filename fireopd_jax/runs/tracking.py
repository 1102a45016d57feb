"""Metrics in metrics.jsonl.

    {"loss": 0.4, ...} -> Tracker -> metrics.jsonl -> history
                                 '-> reporter: the same on other trackers, if there are any

Non-finite numbers are written as the strings "nan", "inf" or "-inf", so that every line is valid
JSON; `history` returns them as floats. This module does not import JAX.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any, TextIO

from fireopd_jax.runs.trackers.reporting import Reporter
from fireopd_jax.runtime.files import plain, write_atomically
from fireopd_jax.runtime.processes import leads
from fireopd_jax.runtime.warnings import warn_once


class Tracker:
    """Appends to `folder/metrics.jsonl`, one line per call, and then reports the same elsewhere.

    Of several processes of a run only the leader appends.
    """

    def __init__(self, folder: Path, reporter: Reporter | None = None):
        self.path, self._reporter = folder / "metrics.jsonl", reporter
        # Drop a line cut off by a kill: the next line would be appended to it.
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._rewrite(inf)
        self._file = self._opened()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the values of a step."""
        line = json.dumps(plain({"step": step, **values}), allow_nan=False)
        try:
            self._file.write(line + "\n")
        except OSError as error:  # A report is not worth the run: what is left is written later.
            warn_once(f"{self.path}: metrics cannot be written ({error.strerror})")
        if self._reporter is not None:
            self._reporter.log(step, values)

    def truncate(self, step: int) -> None:
        """Remove the lines from `step` on, which a resumed run writes again; begin the report."""
        self._file.close()
        if self._reporter is not None:
            records = [(line["step"], line) for line in map(json.loads, self._lines(inf))]
            before = [(at, _values(line)) for at, line in records if at < step]
            dropped = [(at, _values(line)) for at, line in records if at >= step]
            self._reporter.begin(step, before, dropped)
        self._rewrite(step)
        self._file = self._opened()

    def has(self, step: int, prefix: str) -> bool:
        """Return whether a line of this step has a key with this prefix."""
        records = map(json.loads, self._lines(step + 1))
        return any(
            record["step"] == step and any(key.startswith(prefix) for key in record)
            for record in records
        )

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return every (step, value) of a key, in the order of the file."""
        found = []
        for record in map(json.loads, self._lines(inf)):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found.append((record["step"], float(record[key])))
        return found

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> "Tracker":
        """Return the tracker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _opened(self) -> TextIO:
        path = self.path if leads() else Path(os.devnull)
        return path.open("a", buffering=1, encoding="utf-8")

    def _lines(self, end: int | float) -> Iterator[str]:
        """Yield the valid lines of the steps before `end`."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] < end:
                    yield line
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def _rewrite(self, end: int | float) -> None:
        write_atomically(self.path, "".join(f"{line}\n" for line in self._lines(end)))


def record_alarm(folder: Path, alarm: Mapping[str, Any]) -> None:
    """Append an alarm to `folder/alarms.jsonl`; a resumed run may append the same one again."""
    if not leads():
        return
    file = folder / "alarms.jsonl"
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(plain(alarm), allow_nan=False) + "\n")
    except OSError as error:
        warn_once(f"{file}: alarms cannot be written ({error.strerror})")


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "step"}
