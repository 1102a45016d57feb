"""`fireopd eval`."""

import json
from collections.abc import Sequence
from pathlib import Path

from fireopd_jax.session.finished import evaluate_model


def show(run: Path, model: str, settings: Sequence[str]) -> None:
    """Print the figures of a run's model on its held-out problems, as JSON."""
    print(json.dumps(evaluate_model(run, model, settings), indent=2))
