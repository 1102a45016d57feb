"""The page itself: the data of one run or more, as JSON in a template that needs nothing else.

RunFiles -> data -> template.html -> report.html
"""

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.comparison import Problem
from fireopd_jax.report import answers, curves, filtering, results, tokens
from fireopd_jax.report.reading import RunFiles, open_run
from fireopd_jax.runtime.files import write_atomically

MARK = "<!doctype html>\n<!-- fireopd report -->"
"""How a page begins."""
BUDGET = 4_700_000
"""Bytes of a page's data."""
MOST_RUNS = 8
SMALLEST = 100_000
"""Bytes for the responses of a run, however much its curves take."""


def write_report(runs: Sequence[str], out: Path | None = None, *, live: bool | None = None) -> Path:
    """Write the page of some runs; return its path, by default report.html in the run.

    That of several runs is named by the second one. `live` as in `open_run`. Raises UserError for
    a path that is no run, and for an `out` that is another file.
    """
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: expected at most {MOST_RUNS} on one page")
    opened = [open_run(run, live=live) for run in runs]
    file = opened[0].path / default_name(opened) if out is None else out.expanduser()
    check_place(file)
    write_atomically(file, page(opened))
    return file


def default_name(runs: Sequence[RunFiles]) -> str:
    """Return the name of the page in the folder of the first run."""
    others = [run.name for run in runs[1:]]
    return "-".join(["report", *(["with", *others] if others else [])]) + ".html"


def check_place(file: Path) -> None:
    """Raise UserError for a folder, or for a file that is no page of ours."""
    if file.is_dir():
        raise UserError(f"--out {file}: a folder; expected a file such as {file / 'report.html'}")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: there is no folder {file.parent}")
    if file.exists():
        with file.open("rb") as old:
            if old.read(len(MARK)) not in (MARK.encode(), b""):
                raise UserError(f"--out {file}: a file that is no report; expected another name")


def page(runs: Sequence[RunFiles]) -> str:
    """Return the page of some runs as HTML."""
    template = files("fireopd_jax.report").joinpath("template.html").read_text(encoding="utf-8")
    title = html.escape(" and ".join(run.name for run in runs))
    before, _, rest = template.partition("{{title}}")
    between, _, after = rest.partition("{{data}}")
    return "".join((MARK, "\n", before, title, between, embedded(data(runs)), after))


def embedded(value: Any) -> str:
    """Return JSON for use within a script element: ASCII, without a character that HTML reads."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def data(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return all that the page shows."""
    common = None
    if len(runs) > 1:
        common = set.intersection(*(answers.keys(run) for run in runs))
    return {"runs": [of_run(run, common, BUDGET // len(runs)) for run in runs]}


def of_run(run: RunFiles, common: set[Problem] | None, budget: int) -> dict[str, Any]:
    """Return what the page shows of a run, in at most `budget` bytes of JSON."""
    metrics = {name: run.metrics(name) for name in run.homes()}
    own = metrics["student"]
    saved = run.completions()
    found: dict[str, Any] = {
        "name": run.name,
        "facts": results.facts(run, own),
        "results": results.results(run),
        "curves": curves.curves(run, metrics),
        "lanes": curves.lanes(run, own),
        "filter": filtering.filtering(run, saved),
        "agreement": tokens.agreement(run, saved),
        "reweight": run.setting("method.reweight", {}),
        "answers": answers.answers(run, common),
    }
    left = budget - len(embedded(found))
    found["responses"] = tokens.responses(run, saved, max(left, SMALLEST))
    found["notes"] = run.notes
    return found
