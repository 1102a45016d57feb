"""The log of a run: lines on the terminal and in logs/run.log.

This module does not import JAX.
"""

import logging
import time
from pathlib import Path

TIME = "%Y-%m-%d %H:%M:%S"
PACKAGE = logging.getLogger("fireopd_jax")


class Log:
    """Prints lines and appends them, with the time, to `folder/run.log`, as warnings of modules."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "run.log").open("a", buffering=1, encoding="utf-8")
        self._handler = logging.StreamHandler(self._file)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
        PACKAGE.addHandler(self._handler)

    def __call__(self, text: str) -> None:
        """Print the text and append it to the log file."""
        print(text, flush=True)
        now = time.strftime(TIME)
        self._file.writelines(f"{now} {line}\n" for line in text.splitlines())

    def close(self) -> None:
        """Close the file."""
        PACKAGE.removeHandler(self._handler)
        self._file.close()

    def __enter__(self) -> "Log":
        """Return the log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()
