"""Answers on disk: one line each, appended, valid or ignored.

    key, tokens in, tokens out, length, JSON

A process killed while it writes leaves at most one torn line, which the length reveals. Several
processes may append to one file and read it.
"""

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError

LINE = re.compile(rb"([0-9a-f]{64}) (\d+) (\d+) (\d+) ")


class Cache:
    """A file of answers by key; the index is in memory, the answers stay on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.tokens_in = self.tokens_out = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Append mode: each line goes to the end of the file, whoever else writes to it.
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise UserError(
                f"served.cache_file: {path} cannot be written: {error.strerror}"
            ) from error
        self._read = 0
        self._index()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, key: str) -> tuple[Any] | None:
        """Return the answer of a key in a tuple, None if there is none."""
        with self._lock:
            place = self._places.get(key)
        if place is None:
            return None
        return (json.loads(os.pread(self._file.fileno(), place[1], place[0])),)

    def add(self, key: str, answer: Any, tokens_in: int, tokens_out: int) -> None:
        """Append an answer; it is on the disk when this returns."""
        text = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
        head = f"{key} {tokens_in} {tokens_out} {len(text)} ".encode()
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            torn = size and os.pread(self._file.fileno(), 1, size - 1) != b"\n"
            self._file.write((b"\n" if torn else b"") + head + text + b"\n")
            os.fsync(self._file.fileno())
            self._index()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Cache":
        """Return the cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _index(self) -> None:
        """Read the lines after those that are known, other processes' among them."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # Torn, or still being written.
                match = LINE.match(line)
                start, self._read = self._read, self._read + len(line)
                if match is None or match.end() + int(match[4]) + 1 != len(line):
                    continue
                key = match[1].decode()
                if key not in self._places:
                    self._places[key] = (start + match.end(), int(match[4]))
                    self.tokens_in += int(match[2])
                    self.tokens_out += int(match[3])
