"""The log of a run: what is shown, on the terminal and in logs/run.log.

Each line is written to the file first, whole, and past all buffers: a terminal that goes away or a
process that is killed costs none. This module does not import JAX.
"""

import logging
import os
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from fireopd_jax.config import UserError
from fireopd_jax.runtime.processes import leads, rank
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.terminal.record import attach
from fireopd_jax.terminal.safe import safe

TIME = "%Y-%m-%d %H:%M:%S"
PACKAGE = "fireopd_jax"


class Log:
    """Prints lines and appends them, with the time, to `folder/run.log`.

    Of several processes of a run those that follow write to `process-N.log`.

    The file also gets whatever else is shown while the log is open: progress, tables, warnings of
    modules, and the error that ends the block.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._path = folder / ("run.log" if leads() else f"process-{rank()}.log")
        self._file: int | None = os.open(self._path, flags, 0o644)
        self._full = False
        self._open = ExitStack()
        self._open.enter_context(attach(self._write))
        self._handlers = _Warnings.installed(self)

    def __call__(self, text: str) -> None:
        """Append the text to the log file and print it."""
        self.write(text)
        print(safe(text), flush=True)

    def write(self, text: str) -> None:
        """Append the text to the log file only."""
        self._write(time.time(), safe(text))

    def _write(self, when: float, text: str) -> None:
        if self._file is None:
            return
        stamp = time.strftime(TIME, time.localtime(when))
        data = "".join(f"{stamp} {line}\n" for line in text.split("\n")).encode()
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            if not self._full:
                self._full = True
                why = error.strerror
                print(f"{self._path}: cannot write ({why}); the run goes on", file=sys.stderr)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._handlers.remove()
            self._open.close()
            file, self._file = self._file, None
            os.close(file)

    def __enter__(self) -> "Log":
        """Return the log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the error that ends the block, if any, and close the file."""
        if isinstance(error, UserError):
            self.write(f"error: {error}")
        elif isinstance(error, Interrupted):
            self.write(str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.write("interrupted")
        elif error is not None:
            self.write("".join(traceback.format_exception(kind, error, trace)).rstrip())
            error.logged_in = self._path  # pyright: ignore[reportAttributeAccessIssue]
        self.close()


class _Warnings(logging.Handler):
    """Writes warnings of all modules to a log."""

    def __init__(self, log: Log, alone: bool):
        super().__init__(logging.WARNING)
        self._log, self._alone = log, alone

    @classmethod
    def installed(cls, log: Log) -> "_Warnings":
        """Return a handler of the package's records, and of all others that reach the root."""
        root = logging.getLogger()
        handler = cls(log, alone=not root.handlers)
        for logger in (root, logging.getLogger(PACKAGE)):
            logger.addHandler(handler)
        return handler

    def remove(self) -> None:
        for logger in (logging.getLogger(), logging.getLogger(PACKAGE)):
            logger.removeHandler(self)

    def handle(self, record: logging.LogRecord) -> bool:
        # A record of the package may come a second time, from the root.
        if not getattr(record, "kept", False):
            record.kept = True
            super().handle(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        own = record.name.partition(".")[0] == PACKAGE
        self._log.write(record.getMessage() if own else f"{record.name}: {record.getMessage()}")
        # Without any other handler Python would have printed it.
        if self._alone and not own and logging.lastResort is not None:
            logging.lastResort.handle(record)
