"""Results of a run: each model's figures with intervals, paired differences, and facts.

summary.json, eval/*.jsonl -> rows of the tables
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.comparison import Problem, difference, numbered
from fireopd_jax.evaluation.responses import Graded, read_responses, rectangle
from fireopd_jax.report.curves import shorter
from fireopd_jax.report.reading import MAIN, RunFiles, Series
from fireopd_jax.runs.summary import models

Rows = dict[Problem, list[Graded]]
"""The responses to each problem."""
HELD_OUT = "held-out problems"


def results(run: RunFiles) -> list[dict[str, Any]]:
    """Return, for each evaluated set, the figures of each model and the paired differences."""
    sets: list[tuple[str, str, Mapping[str, Any]]] = [(HELD_OUT, "", run.summary or so_far(run))]
    others = run.summary.get("sets")
    for name, figures in others.items() if isinstance(others, Mapping) else ():
        if isinstance(figures, Mapping):
            sets.append((str(name), f".{name}", figures))
    found = []
    for name, suffix, summary in sets:
        known = sorted(models(summary), key=lambda each: not each[0].startswith(MAIN))
        rows = [row for model, figures in known if (row := _row(model, figures))]
        if rows:
            pairs = list(_pairs(run, suffix, [row["model"] for row in rows]))
            found.append({"set": name, "rows": rows, "pairs": pairs})
    return found


def labels(run: RunFiles) -> dict[str, str]:
    """Return the names of the files in eval/ by model: teachers, student, controls."""
    stems = sorted(file.stem for file in (run.path / "eval").glob("*.json*") if is_final(file))
    teachers = [stem for stem in dict.fromkeys(stems) if stem.startswith("teacher_")]
    controls = [stem for stem in dict.fromkeys(stems) if stem.startswith("control_")]
    found = {"student before": "student_before", "student after": "student_after"}
    for stem in teachers:
        name = "teacher" if len(teachers) == 1 else f"teacher {unquote(stem[len('teacher_') :])}"
        found[name] = stem
    return found | {f"control {stem[len('control_') :]}": stem for stem in controls}


def is_final(file: Path) -> bool:
    """Return whether a file of eval/ is of the held-out problems, at the start or the end."""
    return "." not in file.stem and "_step_" not in file.stem


def so_far(run: RunFiles) -> dict[str, Any]:
    """Return the summary of a run that has not ended, from the evaluations that it has made."""
    found: dict[str, Any] = {"teacher": {}, "controls": {}}
    for name, label in labels(run).items():
        if not (figures := run.read_object(f"eval/{label}.json")):
            continue
        role, _, rest = name.partition(" ")
        if role == "student":
            found[label] = figures
        elif role == "control":
            found["controls"][rest] = figures
        elif rest:
            found["teacher"][rest] = figures
        else:
            found["teacher"] = figures
    return found


def _row(model: str, figures: Any) -> dict[str, Any] | None:
    """Return a line of the table of results; None for figures without a score."""
    if not isinstance(figures, Mapping):
        return None
    key = next((key for key in figures if key.startswith("avg@")), None)
    if key is None:
        return None
    return {
        "model": model,
        "metric": key,
        "value": _number(figures.get(key)),
        "interval": _number(figures.get("interval_95")),
        "problems": figures.get("problems"),
        "length": _number(figures.get("mean_length")),
        "finished": _number(figures.get("finished")),
        "others": {
            name: [_number(figures[name]), _number(figures.get(f"{name}_interval_95"))]
            for name in figures
            if name.startswith(("pass@", "maj@")) and not name.endswith("_interval_95")
        },
    }


def _number(value: Any) -> float | None:
    try:
        return shorter(float(value))
    except (TypeError, ValueError):
        return None


def _pairs(run: RunFiles, suffix: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the paired differences of the student after training from every other model."""
    known = labels(run)
    responses = {name: graded(run, f"{known[name]}{suffix}") for name in names if name in known}
    ours = responses.get("student after")
    for name, theirs in responses.items():
        if not ours or not theirs or name == "student after":
            continue
        common = [key for key in ours if key in theirs]
        if not common:
            continue
        figures = difference([ours[key] for key in common], [theirs[key] for key in common])
        yield {"against": name} | {key: shorter(float(x)) for key, x in figures.items()}


def graded(run: RunFiles, label: str) -> Rows | None:
    """Return the graded responses of a model by problem; None where there are none."""
    file = run.path / "eval" / f"{label}.jsonl"
    if not file.exists():
        return None
    try:
        sets = read_responses(file)
        rows = [row for each in sets.values() for row in rectangle(each)]
    except (UserError, OSError):
        run.note(f"eval/{file.name} is damaged and left out")
        return None
    return numbered(rows)


def facts(run: RunFiles, metrics: Mapping[str, Series]) -> dict[str, Any]:
    """Return state, method, models, steps, tokens, seconds, machine and command of a run."""
    steps = max((series.steps[-1] for series in metrics.values() if series.steps), default=0)
    tokens, seconds = (
        metrics[key].values if key in metrics else () for key in ("num_tokens", "timing_s/step")
    )
    environment = run.environment
    git = environment.get("git")
    packages = environment.get("packages")
    return {
        "state": run.state,
        "failed": run.summary.get("failed"),
        "steps": steps,
        "of_steps": run.setting("run.steps"),
        "tokens": sum(x for x in tokens if x == x) or None,
        "train_seconds": shorter(float(sum(x for x in seconds if x == x))) or None,
        "seconds": run.summary.get("seconds"),
        "method": {
            stage: kind
            for stage in ("score", "filter", "reweight", "loss", "refine")
            if (kind := run.setting(f"method.{stage}.kind")) not in (None, "none")
        },
        "student": model_name(run.setting("student")),
        "teachers": {
            str(name): model_name(each) for name, each in (run.setting("teachers") or {}).items()
        },
        "data": run.setting("data.path"),
        "seed": run.setting("run.seed"),
        "devices": environment.get("devices"),
        "version": packages.get("fireopd-jax") if isinstance(packages, Mapping) else None,
        "commit": git.get("commit") if isinstance(git, Mapping) else None,
        "changed": git.get("changed") if isinstance(git, Mapping) else None,
        "command": command(environment.get("command")),
        "series": MAIN,
    }


def model_name(model: Any) -> str | None:
    """Return a model's path, or what is known of one that was made in the run."""
    if not isinstance(model, Mapping):
        return None
    if model.get("path"):
        return str(model["path"])
    shape = model.get("architecture")
    if not isinstance(shape, Mapping):
        return None
    return (
        f"{shape.get('model_type', 'decoder')}, {shape.get('num_hidden_layers')} layers of "
        f"{shape.get('hidden_size')}, made in the run"
    )


def command(words: Any) -> str | None:
    """Return the command line that began a run, for a shell."""
    if not isinstance(words, list) or not words:
        return None
    program = Path(str(words[0]))
    first = "fireopd" if program.name in ("__main__.py", "fireopd") else str(program)
    return shlex.join([first, *(str(word) for word in words[1:])])
