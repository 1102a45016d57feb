"""What a tracker is: a module that opens one writer for each series of a run.

A series is the course of one student, control or supervised stage: `Series -> Writer`. Writers are
called on a thread of their own and may raise anything; `reporting` sees to it that no run is lost.
This module does not import JAX.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

MAIN = "student"
"""The series that carries the run's own name."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One course of metrics, and where it belongs."""

    name: str
    """`student`, the name of a control, or `sft_NAME`."""
    folder: Path
    """The run's folder."""
    run_id: str
    """Unique id of the run, the same in every process that continues it."""
    project: str | None
    config: Mapping[str, Any]
    first: int
    """First step that this process writes; earlier ones were written before."""
    known: bool
    """Whether an earlier process of the run opened this series."""
    options: frozenset[str] = frozenset()
    """Modes that the start of the run has decided, such as `offline`."""

    @property
    def title(self) -> str:
        """Name that is displayed: the run's, with that of the series unless it is the student."""
        return self.folder.name if self.name == MAIN else f"{self.folder.name}-{self.name}"


@runtime_checkable
class Writer(Protocol):
    """Writes one series."""

    replaces: ClassVar[bool]
    """Whether steps that are written again replace those of an earlier process."""
    kept: bool
    """Whether the tracker still has the steps before `Series.first`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        ...

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write sampled responses as a table of texts."""
        ...

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """Write the results of the run, after its last step."""
        ...

    def close(self, complete: bool) -> None:
        """Flush and close; `complete` is false for a run that was stopped."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """One kind of tracker."""

    @property
    def extra(self) -> str:
        """Extra of this package that installs it."""
        ...

    def missing(self) -> str | None:
        """Return the module that is not installed, None if all are."""
        ...

    def begin(self, folder: Path, project: str | None) -> tuple[frozenset[str], str]:
        """Return the modes of this run, and a line that says where the metrics can be seen."""
        ...

    def open(self, series: Series) -> Writer:
        """Return the writer of a series."""
        ...
