"""The table and the learning curve of a finished run, and its README."""

from collections.abc import Iterator, Mapping
from typing import Any

from fireopd_jax.runs import write_atomically
from fireopd_jax.session import Session
from fireopd_jax.tracking import Tracker, curve, table

Figures = Mapping[str, Any]


def models(session: Session, summary: Figures) -> Iterator[tuple[str, Figures]]:
    """List the evaluated models of a summary, in the order of the run."""
    if "teacher" in summary:
        several = len(session.setup.teachers) > 1
        named = summary["teacher"] if several else {"": summary["teacher"]}
        for name, figures in named.items():
            yield f"teacher {name}".strip(), figures
    for key in ("student_before", "student_after"):
        if key in summary:
            yield key.replace("_", " "), summary[key]
    for name, figures in summary.get("controls", {}).items():
        yield f"control {name}", figures


def results_rows(session: Session, summary: Figures) -> list[tuple[str, ...]]:
    """Lay the figures out, a row a model."""
    key = f"avg@{session.setup.config.eval.samples}"
    return [
        (
            name,
            f"{figures[key]:.3f} ± {figures['interval_95']:.3f}",
            str(figures["problems"]),
            f"{figures['mean_length']:.1f}",
            f"{figures['finished']:.2f}",
        )
        for name, figures in models(session, summary)
    ]


def columns(session: Session) -> tuple[str, ...]:
    """Head the table."""
    key = f"avg@{session.setup.config.eval.samples} (95 % interval)"
    return ("model", key, "problems", "mean length", "finished")


def print_results(session: Session, summary: Figures) -> None:
    """Print the table."""
    rows = results_rows(session, summary)
    if rows:
        table(rows, columns(session), title=f"{session.folder.path}: held-out problems")


def print_curve(session: Session) -> None:
    """Print the learning curves: grades where the run took them, else the KL to the teacher."""
    homes = {"student": session.folder.path}
    homes |= {n: session.folder.path / "controls" / n for n in session.setup.config.run.compare}
    key, title = "eval/held_out/avg@1", "avg@1 on held-out problems"
    if not session.setup.config.eval.every:
        key, title = "distill/reverse_kl", "KL(student || teacher) on the student's tokens, nats"
    series = {}
    for name, home in homes.items():
        with Tracker(home) as tracker:
            series[name] = tracker.history(key)
    session.log(curve(series, title))


def write_card(session: Session, summary: Figures) -> None:
    """Write the run's README: what was trained, how, and what came out."""
    rows = [columns(session), ("---",) * 5, *results_rows(session, summary)]
    lines = [
        f"# {session.folder.path.name}",
        "",
        f"A student distilled by {session.setup.config.method.loss.kind} for "
        f"{session.setup.config.run.steps} steps; the whole recipe is in `config.yaml`, the "
        "environment in `env.json`.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "The model is in `models/student`; `fireopd generate` and `fireopd eval` read this folder.",
    ]
    write_atomically(session.folder.card, "\n".join(lines) + "\n")
