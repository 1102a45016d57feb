"""The beginning of a run that several processes share: one configuration, one folder.

Config of each process -> agreement -> the folder that process 0 opens and locks
"""

import json
from pathlib import Path

from fireopd_jax.config import UserError
from fireopd_jax.recipe.schema import Config, as_tree
from fireopd_jax.runs.changes import Changes, differences
from fireopd_jax.runs.folder import Compare, RunFolder, RunState, open_run
from fireopd_jax.runtime.files import plain
from fireopd_jax.runtime.processes import by_leader, count, gathered


def open_together(config: Config, compare: Compare) -> RunFolder:
    """Return the run's folder, which the leader opens and locks, in every process of the run."""
    folders: list[RunFolder] = []

    def opened() -> tuple[Path, RunState, Changes]:
        folder = open_run(config.run, as_tree(config), compare=compare)
        folders.append(folder)
        return folder.path.absolute(), folder.state, folder.changes

    path, state, changes = by_leader(opened)
    return folders[0] if folders else RunFolder(path, state, None, changes)


def check_agreement(config: Config) -> None:
    """Raise UserError where the processes of a run cannot share it.

    That is where their configurations differ, and for what one process does for itself: windows of
    rollouts in files, rows in flight, and servers that are asked.
    """
    if count() == 1:
        return
    texts = gathered(json.dumps(plain(as_tree(config))).encode())

    def check() -> None:
        own = json.loads(texts[0])
        for number, text in enumerate(texts):
            if differing := differences(own, json.loads(text), lambda key: True):
                raise UserError(
                    f"process {number} has another configuration than process 0: {differing[0]}"
                )
        served = {f"teachers.{name}.served": each.served for name, each in config.teachers.items()}
        alone = served | {
            "rollout.window": config.rollout.window > 1,
            "rollout.overprovision": config.rollout.overprovision,
        }
        for key, used in alone.items():
            if used:
                raise UserError(
                    f"{key}: not supported with {count()} processes; expected one, or a run "
                    "without it"
                )

    by_leader(check)
