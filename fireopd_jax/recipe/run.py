"""Where a run is kept, how long it is, and how often it saves and reports."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from fireopd_jax.config import config


@config
class RunConfig:
    """Where a run is kept, how long it is, and how often it saves and speaks."""

    name: str = "run"
    """Name of the run's folder in `runs/`; a number is added when it is taken."""
    dir: str | None = None
    """The run's folder itself: started when new, resumed when interrupted. Empty: by name."""
    seed: int = 0
    """Everything random in the run is a function of it."""
    steps: PositiveInt = 100
    """Batches of rollouts that the student learns from."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer updates on each batch of rollouts; the loss's clipping acts from the second on."""
    compare: tuple[str, ...] = ()
    """Methods (names in `configs/method/`) trained besides, from the same start and budget."""
    resume: Literal["auto", "never"] = "auto"
    """Whether an interrupted run in `dir` goes on (auto) or is an error (never)."""
    save_every: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_best: NonNegativeInt = 1
    """How many checkpoints of the best evaluations are kept besides."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""
    completions_every: NonNegativeInt = 50
    """Steps between saved samples of prompts and responses; 0 saves none."""
    export: bool = False
    """Write the finished student to `models/student_hf` too, as a Hugging Face folder."""
    compilation_cache: bool = True
    """Keep compiled programs on disk for later runs."""
