"""Checkpoints of a run with Orbax: one folder per step, written under another name and renamed.

    save(step, state, position): train state, data position    restore() -> the newest checkpoint

An interrupted write leaves no checkpoint behind, and files are written asynchronously. A checkpoint
whose files are damaged is moved aside, and the one before it is restored.
"""

import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from fireopd_jax.config import UserError
from fireopd_jax.runtime.files import write_atomically
from fireopd_jax.runtime.limits import parse_json
from fireopd_jax.runtime.processes import leads

log = logging.getLogger(__name__)

Tree = TypeVar("Tree")
METRICS = "metrics"
DAMAGED = "damaged"
"""Folder beside that of the checkpoints, for those that cannot be read."""
LEFTOVERS = ("Event loop is closed", "Encountered error while reading array")
REASON = 200
"""Characters of an error of Orbax that are shown."""


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
        silence_leftovers()
        _without_damaged_metrics(folder)
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
        a donated buffer that has a view. Raises UserError where this, or the checkpoint before it,
        cannot be written.
        """
        with self._written(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
                ),
                metrics=metrics or {},
            )

    def rate(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a checkpoint that has been saved; waits for its files."""
        with self._written(step):
            self._manager.wait_until_finished()
            if leads():
                file = self.folder / str(step) / METRICS / METRICS
                write_atomically(file, json.dumps(metrics))
            self._manager.reload()

    def restore(self, like: Tree, step: int | None = None) -> tuple[int, Tree, dict[str, Any]]:
        """Return (step, state, position) of a checkpoint, by default the newest that is whole.

        `like` has the shapes, dtypes and shardings of the state, as arrays or abstract arrays.
        Damaged checkpoints that are newer are moved aside, with a warning. Raises
        FileNotFoundError without a checkpoint, and UserError where none can be read.
        """
        steps = self.steps()[::-1] if step is None else [step]
        if not steps:
            raise FileNotFoundError("no checkpoint has been saved")
        reasons: dict[int, str] = {}
        for each in steps:
            try:
                restored = self._restored(each, like)
            except Exception as error:  # Orbax and its libraries raise a dozen kinds.
                reasons[each] = shortened(error)
                continue
            for damaged, reason in reasons.items():
                self._move_aside(damaged, reason)
            return each, restored["state"], restored["position"]
        newest = max(reasons)
        raise UserError(
            f"{self.folder}: none of its {len(steps)} checkpoints can be read (of step {newest}: "
            f"{reasons[newest]}); delete the folder to begin again"
        )

    def _restored(self, step: int, like: Any) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore()
            ),
        )

    def _move_aside(self, step: int, reason: str) -> None:
        """Move a damaged checkpoint out of the folder: its step will be saved again."""
        folder, to = self.folder / str(step), self.folder.parent / DAMAGED / str(step)
        number = 1
        while to.exists():
            number += 1
            to = to.with_name(f"{step}-{number}")
        if leads():
            to.parent.mkdir(exist_ok=True)
            folder.rename(to)
        self._manager.reload()
        log.warning(
            f"{folder} is damaged, moved to {to}: {reason}; the checkpoint before it is used"
        )

    @contextmanager
    def _written(self, step: int) -> Iterator[None]:
        """Raise UserError for what the threads that write files, or the disk, complain of."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"{self.folder}: a checkpoint could not be written, at step {step}: "
                f"{shortened(error)}; older ones are whole, resume once the disk takes files again"
            ) from error

    def close(self) -> None:
        """Wait until all files are written, and close the manager."""
        with self._written(self._manager.latest_step() or 0):
            self._manager.wait_until_finished()
            self._manager.close()


def _without_damaged_metrics(folder: Path) -> None:
    """Empty the metrics that cannot be read: Orbax would not open the folder for them."""
    for step in saved_steps(folder):
        file = folder / str(step) / METRICS / METRICS
        try:
            whole = not file.exists() or isinstance(parse_json(file.read_bytes()), dict)
        except (OSError, ValueError):
            whole = False
        if not whole and leads():
            log.warning(f"{file} is damaged: step {step} has no score any more")
            shutil.rmtree(file) if file.is_dir() else file.unlink()
            write_atomically(file, "{}")


@functools.cache
def silence_leftovers() -> None:
    """Drop what Orbax prints, besides the error it raises, of files it cannot read or write."""
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        # Its other reads of the checkpoint end later, without anybody who waits for them.
        if not str(raised.exc_value).startswith(LEFTOVERS):
            before(raised)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def shortened(error: Exception) -> str:
    """Return the text of an error in one line, of one of the disk its reason."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON else f"{text[:REASON]}..."


def save_model(folder: Path, params: Any, description: dict[str, Any]) -> None:
    """Write a model's parameters, then its description: `model.json` marks it as complete.

    Raises UserError where the disk does not take them.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "params").absolute(), params, force=True)
    except Exception as error:
        raise UserError(
            f"{folder}: the parameters could not be written: {shortened(error)}; resume once the "
            "disk takes files again"
        ) from error
    if not leads():
        return
    beside = folder / "model.json.part"
    beside.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    beside.rename(folder / "model.json")


def restore_params(folder: Path, like: Tree) -> Tree:
    """Return a model's parameters in the shapes, dtypes and shardings of `like`.

    Raises UserError for damaged files.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    silence_leftovers()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((folder / "params").absolute(), abstract)
    except Exception as error:  # Orbax and its libraries raise a dozen kinds.
        raise UserError(
            f"{folder}: the parameters cannot be read ({shortened(error)}); if its files are "
            "damaged, delete the folder: a resumed run makes this model again"
        ) from error


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, which may still be written to."""
    # Orbax writes under another name, then renames.
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def restore_step_params(folder: Path, step: int, like: Tree) -> Tree:
    """Return the parameters of one checkpoint, without its optimizer state.

    Raises UserError for damaged files.
    """
    item = {"params": like}
    silence_leftovers()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                (folder / str(step) / "state").absolute(),
                ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # Orbax and its libraries raise a dozen kinds.
        raise UserError(
            f"{folder / str(step)}: the checkpoint cannot be read ({shortened(error)}); expected "
            "another step, this one is damaged"
        ) from error
    return restored["params"]
