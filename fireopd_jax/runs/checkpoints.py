"""Keep the state of a run through Orbax: one folder a step, written beside and renamed.

    save(step, state, position): train state, data position.   restore() -> the newest whole one

An interrupted write leaves no checkpoint behind, and saving does not hold up the training.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints of one run: the `keep` newest and, by a metric, the `keep_best` best stay."""

    def __init__(self, folder: Path, *, keep: int, keep_best: int = 0, metric: str = "score"):
        self.folder = folder
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics.get(metric, float("-inf")),
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Give the newest step saved, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """List the steps saved."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save the state after `step` steps; returns before the files are written."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
            metrics=metrics,
        )

    def restore(self, like: Tree, step: int | None = None) -> tuple[int, Tree, dict[str, Any]]:
        """Read a checkpoint (by default the newest) into the shapes and shardings of `like`."""
        step = self._manager.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError("no checkpoint has been saved")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
            ),
        )
        return step, restored["state"], restored["position"]

    def close(self) -> None:
        """Wait for the files to be written."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_model(folder: Path, params: Any, description: dict[str, Any]) -> None:
    """Write a model's parameters and description; `model.json` appears last and marks it whole."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), params, force=True)
    beside = folder / "model.json.part"
    beside.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    beside.rename(folder / "model.json")


def restore_params(folder: Path, like: Tree) -> Tree:
    """Read a model's parameters into the shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "params").absolute(), abstract)


def saved_steps(folder: Path) -> list[int]:
    """List the whole checkpoints in a folder that another process may be writing to."""
    # Orbax writes beside, under another name, and renames.
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def restore_step_params(folder: Path, step: int, like: Tree) -> Tree:
    """Read the parameters alone, without the optimizer, from one checkpoint of training."""
    item = {"params": like}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            (folder / str(step) / "state").absolute(),
            ocp.args.PyTreeRestore(
                item=item,
                restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True,
            ),
        )
    return restored["params"]
