"""trackio: one run for each series, in a database on this machine."""

import contextvars
import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from fireopd_jax.runs.trackers.base import Series

PROJECT = "fireopd"


@dataclasses.dataclass(frozen=True)
class Trackio:
    """Logs to trackio's local database; to a Space only where `TRACKIO_SPACE_ID` names one."""

    extra: str = "trackio"

    def missing(self) -> str | None:
        """Return `trackio` if it is not installed."""
        return None if importlib.util.find_spec("trackio") else "trackio"

    def begin(self, folder: Path, project: str | None) -> tuple[frozenset[str], str]:
        """Return no modes, and the command that shows the metrics."""
        space = os.environ.get("TRACKIO_SPACE_ID")
        where = f"Space {space}" if space else f"trackio show --project {project or PROJECT}"
        return frozenset(), where

    def open(self, series: Series) -> "Run":
        """Return the writer of a series."""
        return Run(series)


class Run:
    """One run of trackio."""

    replaces: ClassVar[bool] = False

    def __init__(self, series: Series):
        self._trackio = importlib.import_module("trackio")
        # trackio ends the current run of the context when it begins another.
        self._context = contextvars.Context()
        self._run = self._context.run(
            self._trackio.init,
            project=series.project or PROJECT,
            # It continues a run by its name, and folders of several places may share theirs.
            name=f"{series.title}-{series.run_id[:4]}",
            group=series.folder.name,
            config=dict(series.config),
            resume="allow",
            embed=False,
        )
        self.kept = series.known

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._context.run(self._run.log, dict(values), step=step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write sampled responses as a table."""
        import pandas

        frame = pandas.DataFrame([list(row) for row in rows], columns=list(columns))
        table = self._trackio.Table(dataframe=frame)
        self._context.run(self._run.log, {"completions": table}, step=step)

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """Write the results of the run as numbers of its last step."""
        self.log(step, {f"summary/{name}": value for name, value in values.items()})

    def close(self, complete: bool) -> None:
        """Finish the run."""
        self._context.run(self._run.finish)
