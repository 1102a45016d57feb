"""Results table, learning curve and README of a finished run."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fireopd_jax.recipe.schema import Config
from fireopd_jax.runs.folder import RunFolder
from fireopd_jax.runs.summary import Figures, models
from fireopd_jax.runs.tracking import Tracker
from fireopd_jax.runtime.files import write_atomically
from fireopd_jax.terminal.curves import curve
from fireopd_jax.terminal.tables import table


def sets(config: Config, summary: Figures) -> Iterator[tuple[str, int, Figures]]:
    """Yield name, samples per problem and figures of each set: held-out problems, `eval.sets`."""
    if config.eval.problems:
        yield "held-out problems", config.eval.samples, summary
    for name, figures in summary.get("sets", {}).items():
        yield name, config.eval.sets[name].samples, figures


def results_rows(samples: int, summary: Figures) -> list[tuple[str, ...]]:
    """Return the cells of the results table of one set, one row per model."""
    key = f"avg@{samples}"
    return [
        (
            name,
            f"{figures[key]:.3f} ± {figures['interval_95']:.3f}",
            str(figures["problems"]),
            f"{figures['mean_length']:.1f}",
            f"{figures['finished']:.2f}",
        )
        for name, figures in models(summary)
    ]


def columns(samples: int) -> tuple[str, ...]:
    """Return the column names of the results table."""
    key = f"avg@{samples} (95 % interval)"
    return ("model", key, "problems", "mean length", "finished")


def print_results(folder: Path, config: Config, summary: Figures) -> None:
    """Print the results table of each set that was evaluated."""
    for name, samples, figures in sets(config, summary):
        rows = results_rows(samples, figures)
        if rows:
            table(rows, columns(samples), title=f"{folder}: {name}")


def print_curve(folder: Path, config: Config, log: Callable[[str], None]) -> None:
    """Log the learning curves: avg@1 if evaluated during training, else the KL to the teacher.

    Without log-probabilities of a teacher it is the loss.
    """
    homes = {"student": folder}
    homes |= {n: folder / "controls" / n for n in config.run.compare}
    key, title = "eval/held_out/avg@1", "avg@1 on held-out problems"
    if not (config.eval.every and config.eval.problems):
        key, title = "distill/reverse_kl", "KL(student || teacher) on the student's tokens, nats"
    series = _histories(homes, key)
    if not series:
        series, title = _histories(homes, "loss"), "loss"
    log(curve(series, title))


def _histories(homes: Mapping[str, Path], key: str) -> dict[str, list[tuple[int, float]]]:
    """Return the values of a metric by name of the model, of those that have it."""
    found = {}
    for name, home in homes.items():
        with Tracker(home) as tracker:
            if history := tracker.history(key):
                found[name] = history
    return found


def write_failure(folder: RunFolder, reason: str) -> None:
    """Write the README of a run that has learnt nothing."""
    lines = [
        f"# {folder.path.name}",
        "",
        f"**This run has learnt nothing.** {reason}.",
        "",
        "There is no finished student. The recipe is in `config.yaml`, the lines of the run in "
        "`logs/run.log`.",
    ]
    write_atomically(folder.card, "\n".join(lines) + "\n")


def write_card(folder: RunFolder, config: Config, summary: Figures) -> None:
    """Write the run's README: method, steps and results."""
    tables = []
    for name, samples, figures in sets(config, summary):
        rows = [columns(samples), ("---",) * 5, *results_rows(samples, figures)]
        tables += [f"On {name}:", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines = [
        f"# {folder.path.name}",
        "",
        f"A student distilled by {config.method.loss.kind} for "
        f"{config.run.steps} steps; the whole recipe is in `config.yaml`, the "
        "environment in `env.json`.",
        "",
        *tables,
        "The model is in `models/student`; `fireopd generate` and `fireopd eval` take this folder.",
    ]
    write_atomically(folder.card, "\n".join(lines) + "\n")
