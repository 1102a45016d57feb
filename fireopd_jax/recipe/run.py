"""Configuration of a run: folder, length, checkpoints and reports."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, field_validator

from fireopd_jax.config import Section, config

TrackerName = Literal["tensorboard", "wandb", "trackio"]

UNPRINTED = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes of a path that are not UTF-8, which checkpoints cannot hold."""


def _names(given: object) -> object:
    """Return the trackers of `a,b`, of one name, or of the `none` that other libraries have."""
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",")]
    return () if given in (None, [], ["none"]) else given


@config
class RunConfig(Section):
    """Folder, length, checkpoints and reports of a run."""

    name: str = "run"
    """Name of the run's folder in `runs/`; a number is appended if it exists."""
    dir: str | None = None
    """Path of the run's folder: a new run, or an interrupted one to resume. By default from
    `name`."""
    seed: int = 0
    """Seed of all randomness in the run."""
    steps: PositiveInt = 100
    """Number of rollout batches that the student is trained on."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Passes over the training rows, in place of `steps`: the number of steps is computed from it,
    rounded up, once the rows are known."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer updates per rollout batch; the loss's clipping takes effect from the second on."""
    compare: tuple[str, ...] = ()
    """Methods (names in `configs/method/`) to train as controls, from the same start, as long."""
    resume: Literal["auto", "never"] = "auto"
    """Resume an interrupted run in `dir` (auto), or raise an error (never)."""
    save_every: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: NonNegativeInt = 1
    """Number of checkpoints with the best evaluation to keep in addition."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""
    report_to: Annotated[
        tuple[TrackerName, ...],
        BeforeValidator(_names, json_schema_input_type=str | tuple[TrackerName, ...]),
    ] = ()
    """Trackers that get the metrics besides metrics.jsonl; each is an extra of the package. wandb
    is offline where no key is found."""
    project: str | None = None
    """Project of wandb and trackio. null: `WANDB_PROJECT` of the environment, else `fireopd`."""
    completions_every: NonNegativeInt = 50
    """Steps between saved batches of prompts and responses; 0 saves none."""
    completions_topk: Annotated[int, Field(ge=0, le=64)] = 0
    """Most probable token ids of student and teacher that are saved for each token of saved
    responses, by another forward pass of both; 0: what the method itself scores, if anything."""
    max_nonfinite: PositiveInt = 20
    """Steps in a row whose loss or gradient is not finite, after which the run stops."""
    export: bool = False
    """Write the finished student to `models/student_hf` too, as a Hugging Face folder."""
    compilation_cache: bool = True
    """Keep compiled programs on disk for later runs."""

    @field_validator("name", "dir")
    @classmethod
    def _is_path(cls, value: str | None) -> str | None:
        if value is not None and UNPRINTED.search(value):
            raise ValueError("expected a path of UTF-8, without control characters")
        return value

    def saves_responses(self, done: int) -> bool:
        """Return whether the responses of the step that ends with `done` steps are saved."""
        every = self.completions_every
        return bool(every) and (done % every == 0 or done == self.steps)

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield `name` if `dir` is given, else `resume`: without `dir` every run is new."""
        if not self.completions_every:
            yield "completions_topk", "with run.completions_every=0"
        if self.dir is not None:
            yield "name", "with run.dir"
        else:
            yield "resume", "without run.dir: every run is new"
