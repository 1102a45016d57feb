"""Curves, alarms, and the seconds of each stage, thinned out to what a page can show.

metrics -> {metric: {student: points}}, lanes of stages
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fireopd_jax.report.reading import MAIN, RunFiles, Series

MOST_POINTS = 240
"""Points of a curve; a longer one is averaged over equal stretches."""
MOST_BINS = 160
"""Stretches of the lanes."""
KEY_METRICS = (
    ("loss", "Loss"),
    ("distill/reverse_kl", "KL(student ‖ teacher), nats a token"),
    ("distill/overlap_ratio", "Overlap of the likeliest words"),
    ("completions/correct", "Right responses"),
    ("completions/mean_length", "Length of a response, tokens"),
    ("completions/clipped_ratio", "Cut off at the limit"),
    ("completions/repetition_rate", "Repetition"),
    ("method/keep_fraction", "Trajectories kept"),
    ("method/token_weight_max", "Largest token weight"),
    ("student_entropy", "Student's entropy, nats"),
    ("teacher_entropy", "Teacher's entropy, nats"),
    ("grad_norm", "Gradient norm"),
    ("audit/agreement", "Agreement of audited chunks"),
    ("audit/base_kl", "KL(base ‖ student)"),
    ("refine/done_fraction", "Responses rewritten"),
    ("refine/length_ratio", "Length of rewrites over originals"),
    ("learning_rate", "Learning rate"),
    ("perf/tokens_per_s", "Tokens a second"),
)
"""Metrics whose curves are shown at once, with their titles; the others are chosen from a list."""
STAGES = ("rollout", "refine", "score", "update", "eval", "save", "compile")
"""Lanes, in the order of a step."""


def curves(run: RunFiles, metrics: Mapping[str, Mapping[str, Series]]) -> dict[str, Any]:
    """Return the points of every metric by student, the titles, and the alarms.

    `metrics` are those of each student. Of controls only the key metrics are returned.
    """
    titles = dict(KEY_METRICS)
    titles |= {"eval/held_out/avg@1": "Right on held-out problems, avg@1"}
    points: dict[str, dict[str, Any]] = {}
    for student, known in metrics.items():
        for name, series in known.items():
            if name.startswith("timing_s/"):
                continue
            shown = name in titles or name.startswith("eval/")
            if student == MAIN or shown:
                points.setdefault(name, {})[student] = thinned(series)
    _with_intervals(points)
    alarms = [alarm | {"student": name} for name in metrics for alarm in run.alarms(name)]
    evaluated = sorted(name for name in points if _is_score(name))
    for name in evaluated:
        titles.setdefault(name, f"Right on {name.split('/')[1]}, {name.rpartition('/')[2]}")
    key = [*evaluated, *(name for name, _ in KEY_METRICS if name in points)]
    return {"points": points, "titles": titles, "key": key, "alarms": alarms}


def _is_score(name: str) -> bool:
    """Return whether a metric is the score of an evaluation: avg@k."""
    return name.startswith("eval/") and "/avg@" in name


def _with_intervals(points: dict[str, dict[str, Any]]) -> None:
    """Turn the 95 % intervals of evaluations into the bands of their scores."""
    for name in [name for name in points if _is_score(name)]:
        half = points.get(f"{name.rpartition('/')[0]}/interval_95", {})
        for student, found in points[name].items():
            interval = half.get(student)
            if interval is None or interval["x"] != found["x"]:
                continue
            pairs = list(zip(found["y"], interval["y"], strict=True))
            found["low"] = [None if y is None or h is None else shorter(y - h) for y, h in pairs]
            found["high"] = [None if y is None or h is None else shorter(y + h) for y, h in pairs]


def thinned(series: Series, most: int = MOST_POINTS) -> dict[str, Any]:
    """Return the points of a curve: x, y, and least and greatest value of each stretch.

    Values that are not finite are None, and left out of the means.
    """
    steps, values = np.asarray(series.steps), np.asarray(series.values)
    if len(steps) <= most:
        return {"x": steps.tolist(), "y": [shorter(value) for value in values.tolist()]}
    edges = np.linspace(0, len(steps), most + 1).astype(int)
    found: dict[str, Any] = {"x": [], "y": [], "low": [], "high": []}
    for start, end in itertools.pairwise(edges):
        part = values[start:end]
        part = part[np.isfinite(part)]
        found["x"].append(int(steps[end - 1]))
        for key, statistic in (("y", np.mean), ("low", np.min), ("high", np.max)):
            found[key].append(shorter(float(statistic(part))) if len(part) else None)
    return found


def shorter(value: float | None, digits: int = 5) -> float | None:
    """Return a number with so many significant digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def lanes(run: RunFiles, metrics: Mapping[str, Series]) -> dict[str, Any]:
    """Return seconds of each stage by stretch of steps, and the bytes that each stage needs."""
    seconds = {
        name.removeprefix("timing_s/"): series
        for name, series in metrics.items()
        if name.startswith("timing_s/") and name != "timing_s/step"
    }
    steps = sorted({step for series in seconds.values() for step in series.steps})
    if not steps:
        return {"steps": [], "lanes": [], "memory": run.memory}
    bins = min(MOST_BINS, len(steps))
    edges = np.linspace(0, len(steps), bins + 1).astype(int)
    index = {step: int(np.searchsorted(edges, i, "right")) - 1 for i, step in enumerate(steps)}
    order = {name: i for i, name in enumerate(STAGES)}
    found = []
    for name in sorted(seconds, key=lambda name: (order.get(name, len(order)), name)):
        sums = np.zeros(bins)
        for step, value in zip(seconds[name].steps, seconds[name].values, strict=True):
            sums[index[step]] += value if math.isfinite(value) else 0.0
        total = float(sums.sum())
        if total > 0 or name in ("rollout", "score", "update"):
            each = [shorter(value, 3) for value in (sums / np.diff(edges)).tolist()]
            found.append({"name": name, "total": shorter(total), "each": each})
    ends = [int(steps[end - 1]) for end in edges[1:]]
    return {"steps": ends, "lanes": found, "memory": run.memory}
