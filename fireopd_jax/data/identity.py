"""The identity of a run's rows: their content, and the folder that its paths begin in.

    rows, folder -> data.json -> located (paths that hold from any folder), check_rows

So a finished run finds its rows from any working directory, and other rows under the same name are
not taken for them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fireopd_jax.config import UserError
from fireopd_jax.data.files import matching
from fireopd_jax.data.repeats import prompt_digest
from fireopd_jax.data.rows import Row
from fireopd_jax.data.settings import DataConfig, SourceConfig
from fireopd_jax.runtime.files import recorded

ROWS_FILE = "data.json"
"""In the folder of a run."""
SHOWN = 12
Sourced = TypeVar("Sourced", bound=SourceConfig)


def rows_digest(rows: Sequence[Row]) -> str:
    """Return a SHA-256 over the prompts, answers, references and teachers of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(prompt_digest(row))
        texts = (row.answer, row.reference, row.privileged, row.teacher)
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()


def identity(rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Return what identifies rows that were read with paths relative to `folder`."""
    return {"folder": str(folder.absolute()), "rows": len(rows), "sha256": rows_digest(rows)}


def check_sets(now: Mapping[str, str], recorded: Mapping[str, Any], run: Path) -> None:
    """Raise UserError if the problems of an evaluation set are not those of the run's start."""
    for name, digest in now.items():
        if recorded.get("sets", {}).get(name, digest) != digest:
            raise UserError(
                f"eval.sets.{name}: its problems have changed since {run} began; expected the same "
                "file, another name, or another run.dir"
            )


def recorded_rows(run: Path) -> dict[str, Any] | None:
    """Return the identity of a run's rows; None for a run of a version that recorded none."""
    file = run / ROWS_FILE
    if not file.is_file():
        return None
    found = recorded(file)
    if not {"folder", "rows", "sha256"} <= found.keys():
        raise UserError(f"{file}: damaged; delete it, a resumed run writes it again")
    return found


def check_rows(rows: Sequence[Row], recorded: Mapping[str, Any], run: Path) -> None:
    """Raise UserError if these are not the rows that a run has recorded."""
    found = rows_digest(rows)
    if found != recorded["sha256"]:
        raise UserError(
            f"data.path: these {len(rows)} rows are not those of {run}, which read "
            f"{recorded['rows']} rows in {recorded['folder']} (SHA-256 {found[:SHOWN]}, there "
            f"{recorded['sha256'][:SHOWN]}); name the run's own rows with data.path=..."
        )


def located(config: DataConfig, folder: Path) -> DataConfig:
    """Return the configuration with the relative paths that exist in `folder` as absolute ones."""
    if config.mixture:
        sources = tuple(_located(source, folder) for source in config.mixture)
        return dataclasses.replace(config, mixture=sources)
    return _located(config, folder)


def _located(source: Sourced, folder: Path) -> Sourced:
    if isinstance(source.path, str):
        return dataclasses.replace(source, path=_in_folder(source.path, folder))
    paths = tuple(_in_folder(path, folder) for path in source.path)
    return dataclasses.replace(source, path=paths)


def _in_folder(path: str, folder: Path) -> str:
    whole = folder / Path(path).expanduser()
    return str(whole) if whole.exists() or matching(str(whole)) else path
