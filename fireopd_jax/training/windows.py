"""Windows of steps whose rollouts are all sampled, and refined, before the first update on them.

    step -> at the first of a window: sample, refine and write the batches of all of its steps
         -> read the batch of this step

A window of one step is plain on-policy training and writes no file. One window as long as the run
is the offline form: a data set of rollouts by the first parameters. A batch is a function of
(parameters at the start of the window, seed, step), so that files of an interrupted window are used
as they are. References: arXiv 2606.08432 (TRD's R rollouts before U updates).
"""

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from jax.sharding import Mesh

from fireopd_jax.config import UserError
from fireopd_jax.runtime.processes import fetched
from fireopd_jax.runtime.signals import Interrupted, StopFlag
from fireopd_jax.sharding.mesh import shard_rows
from fireopd_jax.types import (
    Audit,
    EarlyScores,
    ModelScores,
    Original,
    Prompts,
    Rollout,
    TokenStats,
)

Sample = Callable[[int], Rollout]
"""Samples the rollout of a step (from 0) with the parameters of the first step of its window."""
Refine = Callable[[Rollout], Rollout]
PARTS: Mapping[str, Any] = {
    "prompts": Prompts,
    "original": Original,
    "audit": Audit,
    "early": EarlyScores,
    "student": ModelScores,
    "teacher": ModelScores,
    "stats": TokenStats,
    "policy": TokenStats,
}
"""Fields of a rollout that are pytrees themselves, and fields of these."""


class Windows:
    """The rollouts of windows of `size` steps, in files of `folder` where `size` exceeds 1."""

    def __init__(self, folder: Path, size: int, steps: int, *, mesh: Mesh, stop: StopFlag):
        self.folder, self.size, self.steps = folder, size, steps
        self.mesh, self.stop = mesh, stop

    def rollout(self, step: int, sample: Sample, refine: Refine) -> Rollout:
        """Return the refined rollout of a step; at the first of a window, draw all of them.

        Within a window a batch is refined while the next is sampled. Raises UserError where the
        file of a step is missing, and Interrupted after a signal, between two batches.
        """
        if self.size == 1:
            return refine(sample(step))
        if step % self.size == 0:
            self._draw(range(step, min(step + self.size, self.steps)), sample, refine)
        file = self._file(step)
        if not file.is_file():
            raise UserError(f"{file}: no such file; the run's window of rollouts has been deleted")
        return shard_rows(self.mesh, read(file))

    def forget(self, before: int) -> None:
        """Delete the rollouts of the steps before `before`, from which no checkpoint resumes."""
        for file in self.folder.glob("step_*.npz"):
            if file < self._file(before):
                file.unlink()

    def _draw(self, steps: range, sample: Sample, refine: Refine) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [step for step in steps if not self._file(step).is_file()]
        with ThreadPoolExecutor(1, "refine") as pool:
            ahead: tuple[int, Future[Rollout]] | None = None
            for step in missing:
                if self.stop:
                    break
                rollout = sample(step)
                if ahead is not None:
                    write(self._file(ahead[0]), ahead[1].result())
                ahead = step, pool.submit(refine, rollout)
            if ahead is not None:
                write(self._file(ahead[0]), ahead[1].result())
        left = [step for step in steps if not self._file(step).is_file()]
        if left:
            raise Interrupted(f"stopped with the rollouts of {len(left)} steps left to sample")

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step + 1:09d}.npz"


def write(file: Path, rollout: Rollout) -> None:
    """Write a rollout's arrays to a file, under another name first."""
    leaves = jax.tree.leaves_with_path(fetched(rollout))
    arrays = {".".join(key.name for key in path): leaf for path, leaf in leaves}
    beside = file.with_suffix(".part")
    with beside.open("wb") as out:
        np.savez(out, **arrays)
    beside.rename(file)


def read(file: Path) -> Rollout:
    """Return the rollout of a file, as NumPy arrays."""
    tree: dict[str, Any] = {}
    try:
        with np.load(file) as arrays:
            for name in arrays.files:
                *parents, field = name.split(".")
                inside = tree
                for parent in parents:
                    inside = inside.setdefault(parent, {})
                inside[field] = arrays[name]
        return _built(Rollout, tree)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}: damaged ({reason}); expected the rollouts of a step of the run's window"
        ) from error


def _built(kind: Any, tree: Mapping[str, Any]) -> Any:
    """Return a pytree from its fields; those that are pytrees themselves are mappings."""
    return kind(
        **{
            name: _built(PARTS[name], value) if isinstance(value, dict) else value
            for name, value in tree.items()
        }
    )
