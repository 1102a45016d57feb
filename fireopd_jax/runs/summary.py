"""The figures of the models in a run's summary, as tables name them.

This module does not import JAX.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]


def models(summary: Figures) -> Iterator[tuple[str, Any]]:
    """Yield name and figures of each evaluated model of a summary, in the order of the run.

    `summary` is that of a run, or of one of its sets; of several teachers it has figures by name.
    """
    if isinstance(teacher := summary.get("teacher"), Mapping) and teacher:
        alone = any(str(key).startswith("avg@") for key in teacher)
        named = {"": teacher} if alone else teacher
        for name, figures in named.items():
            yield f"teacher {name}".strip(), figures
    for key in ("student_before", "student_after"):
        if key in summary:
            yield key.replace("_", " "), summary[key]
    if isinstance(controls := summary.get("controls"), Mapping):
        for name, figures in controls.items():
            yield f"control {name}", figures
