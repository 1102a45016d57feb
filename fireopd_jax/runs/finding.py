"""The folder of a run that a command is given, and errors that name the nearest one.

This module does not import JAX.
"""

from pathlib import Path

from fireopd_jax.config import UserError, nearest


def find_run(run: str, command: str) -> Path:
    """Return the folder of a run; raise UserError, with the nearest right thing, for another path.

    `command` is what the run is for, such as "resume".
    """
    folder = Path(run).expanduser()
    if (folder / "config.yaml").is_file():
        return folder
    above = next((each for each in folder.parents if (each / "config.yaml").is_file()), None)
    if above is not None:
        raise UserError(f"{run}: not the folder of a run, but in one: fireopd {command} {above}")
    if folder.suffix in (".yaml", ".yml"):
        raise UserError(f"{run}: a configuration; fireopd train {run} begins a run with it")
    if not folder.exists() and (Path("runs") / folder / "config.yaml").is_file():
        raise UserError(f"{run}: no such folder (did you mean {'runs' / folder}?)")
    if not folder.exists():
        raise no_run(folder)
    raise UserError(f"{run}: no run is there (no config.yaml); expected such as runs/latest")


def no_run(run: Path) -> UserError:
    """Return the error for a folder without a run's models, with the nearest one beside it."""
    if not run.is_dir():
        known = [path.name for path in run.parent.glob("*") if (path / "config.yaml").is_file()]
        near = nearest(run.name, sorted(known))
        return UserError(f"{run}: no such folder; expected that of a run{near}")
    if any((run / name).is_file() for name in ("model.json", "config.json")):
        return UserError(f"{run}: a model; expected the folder of a run")
    return UserError(f"{run}: no finished model; expected the folder of a run that has trained")
