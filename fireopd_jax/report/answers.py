"""Answers to the same problems: of several models, of two runs, and over the training.

eval/*.jsonl -> problems, each with the answers of every model and of every evaluated step
"""

from typing import Any

from fireopd_jax.evaluation.comparison import Problem
from fireopd_jax.evaluation.responses import Graded
from fireopd_jax.report.filtering import evenly
from fireopd_jax.report.reading import RunFiles
from fireopd_jax.report.results import Rows, graded, labels

MOST_PROBLEMS, MOST_STEPS = 24, 24
MOST_TEXT = 1500
"""Characters of an answer, and of a prompt, from its end."""


def models(run: RunFiles) -> dict[str, Rows]:
    """Return the graded responses on held-out problems of each model of a run by its name."""
    found = {}
    for name, label in labels(run).items():
        if rows := graded(run, label):
            found[name] = rows
    return found


def over_training(run: RunFiles) -> dict[int, Rows]:
    """Return the graded responses on held-out problems after some steps of the training."""
    files = sorted((run.path / "eval").glob("student_step_*.jsonl"))
    files = [file for file in files if file.stem.rpartition("_")[2].isdigit()]
    found = {}
    for i in evenly(len(files), MOST_STEPS):
        rows = graded(run, files[i].stem)
        if rows:
            found[int(files[i].stem.rpartition("_")[2])] = rows
    return found


def chosen(
    all_models: dict[str, Rows], steps: dict[int, Rows], common: set[Problem] | None
) -> list[Problem]:
    """Return the problems that are shown: those whose verdict changes first.

    `common` are the problems of all runs of the page; None for one run.
    """
    before, after = (all_models.get(f"student {when}", {}) for when in ("before", "after"))
    watched = next(iter(steps.values()), {})
    known = dict.fromkeys(key for rows in (*all_models.values(), watched) for key in rows)
    if common is not None:
        known = dict.fromkeys(key for key in known if key in common)

    def rank(key: Problem) -> tuple[bool, bool]:
        pair = [rows[key][0].correct for rows in (before, after) if key in rows]
        return key not in watched and bool(watched), len(set(pair)) < 2

    return sorted(known, key=rank)[:MOST_PROBLEMS]


def answers(run: RunFiles, common: set[Problem] | None = None) -> dict[str, Any]:
    """Return the problems, and the first answer of each model and step to each."""
    all_models, steps = models(run), over_training(run)
    problems = []
    for key in chosen(all_models, steps, common):
        every = [rows[key] for rows in (*all_models.values(), *steps.values()) if key in rows]
        first = every[0][0]
        problems.append(
            {
                "key": "|".join(str(part) for part in key),
                "prompt": text_of(first.prompt)[-MOST_TEXT:],
                "answer": first.answer,
                "answers": {
                    name: shown(rows[key][0]) for name, rows in all_models.items() if key in rows
                },
                "steps": [
                    [step, *shown(rows[key][0])] for step, rows in steps.items() if key in rows
                ],
            }
        )
    return {"models": list(all_models), "problems": problems}


def shown(response: Graded) -> list[Any]:
    """Return text, verdict, length and whether it has ended."""
    text = response.response
    cut = f"{text[:MOST_TEXT]} …" if len(text) > MOST_TEXT else text
    return [cut, response.correct, response.tokens, response.finished]


def text_of(prompt: Any) -> str:
    """Return a prompt as text: that of one turn, or its turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)


def keys(run: RunFiles) -> set[Problem]:
    """Return the problems that a run's student has answered."""
    found: set[Problem] = set()
    for rows in models(run).values():
        found |= set(rows)
    return found
