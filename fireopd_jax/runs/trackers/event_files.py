"""TensorBoard: event files in `logs/tensorboard`, one folder for each series."""

import dataclasses
import importlib
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fireopd_jax.runs.trackers.base import Series

CELL = 1000
"""Characters of a text in a table."""


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Writes event files with tensorboardX, which needs no TensorFlow."""

    extra: str = "tensorboard"

    def missing(self) -> str | None:
        """Return `tensorboardX` if it is not installed."""
        return None if importlib.util.find_spec("tensorboardX") else "tensorboardX"

    def begin(self, folder: Path, project: str | None) -> tuple[frozenset[str], str]:
        """Return no modes, and the command that shows the metrics."""
        return frozenset(), f"tensorboard --logdir {folder / 'logs' / 'tensorboard'}"

    def open(self, series: Series) -> "EventFiles":
        """Return the writer of a series."""
        return EventFiles(series)


class EventFiles:
    """Writes one event file; a process that continues the series adds another beside it."""

    replaces: ClassVar[bool] = True

    def __init__(self, series: Series):
        # SummaryWriter writes on a thread of its own, whose death blocks the caller for ever: a
        # full disk is seen only by the writer below it.
        from tensorboardX.event_file_writer import EventsWriter

        events = importlib.import_module("tensorboardX.proto.event_pb2")

        self._event = events.Event
        home = series.folder / "logs" / "tensorboard" / series.name
        home.mkdir(parents=True, exist_ok=True)
        before = len(list(home.glob("events.out.tfevents.*")))
        self.kept = bool(before)
        self._writer = EventsWriter(str(home / "events"), f".{before:04d}.{os.getpid()}")
        if self.kept:
            # TensorBoard drops what earlier files hold from this step on.
            log = events.SessionLog(status=events.SessionLog.START)
            self._write(series.first, session_log=log)
        else:
            shown = yaml.safe_dump(dict(series.config), sort_keys=False)
            self._text(0, "config", f"```\n{shown}```")
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))
        self._writer.flush()

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write sampled responses as a Markdown table."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._text(
            step, "completions", "\n".join(f"| {' | '.join(map(_cell, x))} |" for x in lines)
        )
        self._writer.flush()

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """Write the results of the run as numbers of its last step."""
        self.log(step, {f"summary/{name}": value for name, value in values.items()})

    def close(self, complete: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _text(self, step: int, name: str, text: str) -> None:
        from tensorboardX.summary import text as text_summary

        self._write(step, summary=text_summary(name, text))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **what))


def _cell(text: str) -> str:
    return text[:CELL].replace("|", "\\|").replace("\n", "<br>")
