"""Checkpoints of a run with Orbax: one folder per step, written under another name and renamed.

    save(step, state, position): train state, data position    restore() -> the newest checkpoint

An interrupted write leaves no checkpoint behind, and files are written asynchronously.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

Tree = TypeVar("Tree")


@dataclasses.dataclass
class Best(checkpoint_managers.PreservationPolicy):
    """Policy that preserves the `n` checkpoints with the largest metric, of those that have it."""

    n: int
    metric: str

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return for each checkpoint whether it is preserved; of equal metrics the newest is."""
        scored = [
            (info.metrics[self.metric], index)
            for index, info in enumerate(checkpoints)
            if self.metric in (info.metrics or {})
        ]
        best = {index for _, index in sorted(scored)[len(scored) - min(self.n, len(scored)) :]}
        return [index in best for index in range(len(checkpoints))]


class Checkpoints:
    """The checkpoints of one run: the `keep` newest and the `keep_best` best by a metric."""

    def __init__(self, folder: Path, *, keep: int, keep_best: int = 0, metric: str = "score"):
        self.folder = folder
        policies: list[Any] = [checkpoint_managers.LatestN(keep), Best(keep_best, metric)]
        options = ocp.CheckpointManagerOptions(
            # Without it no metrics are written, and a resumed run would drop the best checkpoint.
            best_fn=lambda metrics: metrics.get(metric, float("-inf")),
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Return the newest saved step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Return the saved steps in ascending order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save the state after `step` steps.

        Returns once the arrays are on the host, so that the state may be donated; a thread writes
        the files. On a CPU the host arrays are views of the device buffers, and JAX does not reuse
        a donated buffer that has a view.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
            metrics=metrics or {},
        )

    def restore(self, like: Tree, step: int | None = None) -> tuple[int, Tree, dict[str, Any]]:
        """Return (step, state, position) of a checkpoint, by default the newest.

        `like` has the shapes, dtypes and shardings of the state, as arrays or abstract arrays.
        Raises FileNotFoundError without a checkpoint.
        """
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
        """Wait until all files are written, and close the manager."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_model(folder: Path, params: Any, description: dict[str, Any]) -> None:
    """Write a model's parameters, then its description: `model.json` marks it as complete."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), params, force=True)
    beside = folder / "model.json.part"
    beside.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    beside.rename(folder / "model.json")


def restore_params(folder: Path, like: Tree) -> Tree:
    """Return a model's parameters in the shapes, dtypes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / "params").absolute(), abstract)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, which may still be written to."""
    # Orbax writes under another name, then renames.
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def restore_step_params(folder: Path, step: int, like: Tree) -> Tree:
    """Return the parameters of one checkpoint, without its optimizer state."""
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
