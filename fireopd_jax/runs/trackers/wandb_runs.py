"""Weights & Biases: one run for each series, in the group of the run; offline without a key."""

import dataclasses
import importlib
import importlib.util
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from fireopd_jax.runs.trackers.base import Series

INIT_S = 30
"""Seconds until a server that does not answer is given up: the run goes on offline."""
FINISH_S = 60
"""Seconds to wait for uploads at the end; what is missing is on disk and can be synced."""
OFFLINE = "offline"
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""The public server, whose name has changed."""
PROJECT = "fireopd"


@dataclasses.dataclass(frozen=True)
class WandB:
    """Logs to a server of Weights & Biases, or to a folder that `wandb sync` uploads."""

    extra: str = "wandb"

    def missing(self) -> str | None:
        """Return `wandb` if it is not installed."""
        return None if importlib.util.find_spec("wandb") else "wandb"

    def begin(self, folder: Path, project: str | None) -> tuple[frozenset[str], str]:
        """Return whether the run is offline, and where its metrics go."""
        os.environ.setdefault("WANDB_SILENT", "true")  # what it has to say is said here
        later = f"wandb sync {folder / 'logs' / 'wandb'}/offline-run-*"
        mode = os.environ.get("WANDB_MODE")
        if mode == OFFLINE:
            return frozenset({OFFLINE}), f"offline (WANDB_MODE); upload later with: {later}"
        if mode or has_key():
            return frozenset(), f"project {project_name(project)}, group {folder.name}"
        return frozenset({OFFLINE}), (
            "no WANDB_API_KEY and no `wandb login` here, so the metrics are kept offline; upload "
            f"them later with: {later}"
        )

    def open(self, series: Series) -> "Run":
        """Return the writer of a series."""
        return Run(series)


class Run:
    """One run of Weights & Biases."""

    replaces: ClassVar[bool] = False

    def __init__(self, series: Series):
        wandb = importlib.import_module("wandb")
        # Its capture of the console would wrap streams that belong to the command line.
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=INIT_S, finish_timeout=FINISH_S
        )
        home = series.folder / "logs"
        home.mkdir(parents=True, exist_ok=True)

        def begin(mode: str | None, own: str = "") -> Any:
            return wandb.init(
                project=project_name(series.project),
                name=series.title,
                id=f"{series.run_id}-{series.name}{own}",
                group=series.folder.name,
                job_type=series.name,
                config=dict(series.config),
                dir=str(home),
                mode=mode,
                resume="allow",
                reinit="create_new",
                save_code=False,
                settings=settings,
            )

        self._wandb, self.notice = wandb, ""
        # Files of one run that are synced later continue it in the order of their starts.
        self.kept = series.known
        if OFFLINE in series.options:
            self._run = begin(OFFLINE)
        else:
            try:
                self._run = begin(None)
                self.kept = bool(self._run.resumed)
            except Exception as error:  # of the server or the network: what is local still works
                self.notice = (
                    f"{' '.join(str(error).split())[:200]}: {series.name} is kept offline; upload "
                    f"it later with: wandb sync {home / 'wandb'}/offline-run-*"
                )
                # The first attempt still occupies the id; this run has the whole series.
                self._run, self.kept = begin(OFFLINE, f"-offline-{series.first}"), False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._run.log(dict(values), step=step)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write sampled responses as a table."""
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({"completions": table}, step=step)

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """Write the results of the run into its summary."""
        self._run.summary.update(dict(values))

    def close(self, complete: bool) -> None:
        """Finish the run: wait for its uploads, for `FINISH_S` at most."""
        self._run.finish(exit_code=0 if complete else 1)


def project_name(project: str | None) -> str:
    """Return the project: as configured, that of the environment, or `PROJECT`."""
    return project or os.environ.get("WANDB_PROJECT") or PROJECT


def has_key() -> bool:
    """Return whether the environment or the file of `wandb login` has a key for the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "").hostname
    hosts = [server] if server else HOSTS
    named = os.environ.get("NETRC")
    for file in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            logins = netrc.netrc(os.path.expanduser(file))
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(logins.authenticators(host) for host in hosts):
            return True
    return False
