"""Metrics in metrics.jsonl.

    {"loss": 0.4, ...} -> Tracker -> metrics.jsonl -> history

Non-finite numbers are written as the strings "nan", "inf" or "-inf", so that every line is valid
JSON; `history` returns them as floats. This module does not import JAX.
"""

import json
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

from fireopd_jax.runtime.files import plain, write_atomically


class Tracker:
    """Appends to `folder/metrics.jsonl`, one line per call."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        # Drop a line cut off by a kill: the next line would be appended to it.
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._rewrite(inf)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the values of a step."""
        line = json.dumps(plain({"step": step, **values}), allow_nan=False)
        self._file.write(line + "\n")

    def truncate(self, step: int) -> None:
        """Remove the lines from `step` on; a resumed run writes them again."""
        self._file.close()
        self._rewrite(step)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return every (step, value) of a key, in the order of the file."""
        records = map(json.loads, self._lines(inf))
        return [
            (record["step"], float(record[key]))
            for record in records
            if record.get(key) is not None
        ]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Tracker":
        """Return the tracker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _lines(self, end: int | float) -> Iterator[str]:
        """Yield the valid lines of the steps before `end`."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] < end:
                    yield line
            except (json.JSONDecodeError, KeyError, TypeError):
                continue

    def _rewrite(self, end: int | float) -> None:
        write_atomically(self.path, "".join(f"{line}\n" for line in self._lines(end)))
