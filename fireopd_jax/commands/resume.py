"""`fireopd resume`."""

from collections.abc import Sequence
from pathlib import Path

from fireopd_jax.config import Key, UserError
from fireopd_jax.recipe.keys import check_layers
from fireopd_jax.recipe.layers import read_layers
from fireopd_jax.runs.finding import find_run
from fireopd_jax.runtime.limits import read_json
from fireopd_jax.runtime.processes import join
from fireopd_jax.terminal.record import recording, say


def resume(run: str, settings: Sequence[str], extend: bool, distributed: bool = False) -> None:
    """Go on with the run in a folder, with some keys changed, by the command that began it."""
    folder = run_folder(run)
    file = str(folder / "config.yaml")
    for setting in settings:
        if "=" not in setting:
            raise UserError(f"{setting}: expected key=value; the configuration is that of {folder}")
        if setting.startswith("run.dir="):
            raise UserError(f"{setting}: the run stays in {folder}; expected other keys")
    check_layers(read_layers([file, *settings]))
    join(distributed)
    with recording():
        from fireopd_jax.runtime.devices import first_line

        # Before the other imports, which take seconds.
        say(first_line())
        go_on(folder, settings, extend)


def go_on(folder: Path, settings: Sequence[str], extend: bool) -> None:
    """Train on; paths that are not among the settings begin where the run began."""
    from fireopd_jax.data.identity import recorded_rows
    from fireopd_jax.recipe.layers import read_file
    from fireopd_jax.recipe.paths import anchored, with_paths
    from fireopd_jax.recipe.schema import load
    from fireopd_jax.training import run as running

    file = str(folder / "config.yaml")
    if not read_file(Path(file)).tree:
        raise UserError(f"{file}: empty; expected the configuration of a run, as it began")
    recorded, own = recorded_rows(folder), {}
    home = Path.cwd() if recorded is None else Path(recorded["folder"])

    def note(key: Key, path: str) -> str:
        own[key] = path
        return path

    def place(key: Key, path: str) -> str:
        return anchored(path, home if own.get(key) == path else Path.cwd())

    with_paths(load([file]).config, note)
    loaded = load([file, f"run.dir={folder}", "run.resume=auto", *settings])
    notes = [line for line in loaded.notes if not line.startswith(f"warning: {file}")]
    work = {"train": running.train, "sft": running.sft}[begun_by(folder)]
    work(with_paths(loaded.config, place), notes, extend=extend)


def run_folder(run: str) -> Path:
    """Return the folder of a run; raise UserError, with the nearest right thing, for another."""
    folder = find_run(run, "resume")
    # runs/latest is another run later.
    return folder.resolve() if folder.is_symlink() else folder


def begun_by(folder: Path) -> str:
    """Return the command that a run was begun by: train, or sft."""
    file = folder / "env.json"
    try:
        work = read_json(file).get("work", "train")
    except (OSError, ValueError, AttributeError):
        return "train"
    return work if work in ("train", "sft") else "train"
