"""Single responses with the numbers of every token, and where teacher and outcome agree.

completions/*.parquet -> a few responses, token by token; sums over all tokens
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from fireopd_jax.report.curves import shorter
from fireopd_jax.report.filtering import column, evenly, step_of
from fireopd_jax.report.reading import RunFiles

MOST_TOKENS = 2000
"""Tokens of a response that are shown."""
MOST_STEPS, OF_STEP = 8, 6
"""Steps that responses are shown of, and responses of each, before the budget cuts them."""
MOST_TEXT = 4000
"""Characters of a prompt, from its end, and of a text that is not shown by tokens."""
NUMBERS = {
    "sl": "student_logprob",
    "se": "student_entropy",
    "tl": "teacher_logprob",
    "te": "teacher_entropy",
    "w": "weight",
}
"""Columns of numbers of tokens, by their short names in the page."""
TEXTS = ("row", "prompt", "answer", "correct", "teacher", "writer", "finished", "kept")
OF_ROWS = ("dropped_by", "filter_score", "filter_threshold", "teacher_score", "refined", "original",
           "leaked", "teacher_entropy_top", "student_entropy_top", "response")  # fmt: skip
OF_TOKENS = ("tokens", "token_text", "token_kept", "token_writer", "coefficient",
             "audited_at", "audited_length", "agreement", "teacher_top_text",
             "teacher_top_logprob", "student_top_text", "student_top_logprob")  # fmt: skip
WORDS = {"teacher": "top", "student": "own"}
"""Whose likeliest words are kept, by their short names in the page."""


def responses(run: RunFiles, files: Sequence[Path], budget: int) -> list[dict[str, Any]]:
    """Return some responses of some steps, of at most `budget` bytes of JSON.

    Of each step the lowest and the highest by the filter's score, and some between them.
    """
    found: list[dict[str, Any]] = []
    strengths = strengths_of(run)
    chosen = [files[i] for i in evenly(len(files), MOST_STEPS)]
    for file in chosen:
        table = run.table(file, (*TEXTS, *OF_ROWS, *OF_TOKENS, *NUMBERS.values()))
        step = step_of(file)
        if table is None or step is None or "tokens" not in table.column_names:
            continue
        lines = chosen_rows(table).to_pylist()
        found += [_response(line, strengths) | {"step": step} for line in lines]
    return within(found, budget)


def strengths_of(run: RunFiles) -> tuple[float, float]:
    """Return alpha and beta of the weights of tokens; 0 where they are not by entropies."""
    for section in ("method.reweight", "method.reweight.tokens"):
        if run.setting(f"{section}.kind") == "confidence_confusion":
            alpha, beta = (run.setting(f"{section}.{name}", 1.0) for name in ("alpha", "beta"))
            return float(alpha), float(beta)
    return 0.0, 0.0


def within(found: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Return as many of the responses as fit, evenly of all steps."""
    sizes = [len(json.dumps(each)) for each in found]
    count = len(found)
    while count and sum(sizes[i] for i in evenly(len(found), count)) > budget:
        count -= 1
    return [found[i] for i in evenly(len(found), count)] if count else []


def chosen_rows(table: pyarrow.Table) -> pyarrow.Table:
    """Return the rows of a step that are shown: spread over the scores, dropped ones among them."""
    none = [None] * table.num_rows
    score = column(table, "filter_score", none)
    if all(each is None for each in score):
        score = column(table, "teacher_score", none)
    order = sorted(range(table.num_rows), key=lambda i: (score[i] is not None, score[i] or 0.0, i))
    return table.take([order[i] for i in evenly(len(order), OF_STEP)])


def _response(line: dict[str, Any], strengths: tuple[float, float]) -> dict[str, Any]:
    """Return a row of the table as the page reads it."""
    length = len(line["tokens"])
    shown = slice(0, MOST_TOKENS)
    text = line.get("token_text")
    found = {key: line.get(key) for key in (*TEXTS, *OF_ROWS)}
    found["prompt"] = str(found["prompt"] or "")[-MOST_TEXT:]
    for key in ("answer", "original", "response"):
        value = found[key]
        found[key] = None if value is None else str(value)[:MOST_TEXT]
    for key in (
        "filter_score",
        "filter_threshold",
        "teacher_score",
        "teacher_entropy_top",
        "student_entropy_top",
    ):
        found[key] = shorter(found[key], 6)
    if text is not None:
        del found["response"]
    found |= {
        "length": length,
        "id": line["tokens"][shown],
        "text": None if text is None else text[shown],
        "keep": None if line.get("token_kept") is None else _ones(line["token_kept"][shown]),
        "by": line.get("token_writer") and line["token_writer"][shown],
        "share": shorter(max(line.get("coefficient") or [0.0], default=0.0)),
        "raw": raw_mean(line, strengths),
        "chunks": [
            [at, size, shorter(agreement, 4)]
            for at, size, agreement in zip(
                line.get("audited_at") or (),
                line.get("audited_length") or [1] * len(line.get("audited_at") or ()),
                line.get("agreement") or (),
                strict=False,
            )
        ],
    }
    for short, name in NUMBERS.items():
        values = line.get(name)
        found[short] = None if values is None else [shorter(x, 5) for x in values[shown]]
    for who, short in WORDS.items():
        found[short] = _words(line, who, shown)
    return found


def _ones(values: Sequence[bool]) -> list[int]:
    return [int(each) for each in values]


def _words(line: dict[str, Any], who: str, shown: slice) -> dict[str, Any] | None:
    """Return the likeliest words at each token: a list of texts, and [index, log-prob, ...]."""
    texts, logprobs = (line.get(f"{who}_top_{name}") for name in ("text", "logprob"))
    if texts is None or logprobs is None:
        return None
    index: dict[str, int] = {}
    at = [
        [x for text, lp in zip(words, numbers, strict=True)
         for x in (index.setdefault(text, len(index)), shorter(lp, 4))]
        for words, numbers in zip(texts[shown], logprobs[shown], strict=True)
    ]  # fmt: skip
    return {"texts": list(index), "at": at}


def raw_mean(line: dict[str, Any], strengths: tuple[float, float]) -> float | None:
    """Return the mean of (1 + alpha c^T)(1 + beta c^S) over a row; None without the maxima."""
    if line.get("teacher_entropy_top") is None or line.get("teacher_entropy") is None:
        return None
    teacher, student = (np.asarray(line[f"{who}_entropy"], float) for who in WORDS)
    sure = 1 - np.clip(teacher / max(line["teacher_entropy_top"], 1e-6), 0, 1)
    unsure = np.clip(student / max(line["student_entropy_top"], 1e-6), 0, 1)
    weights = (1 + strengths[0] * sure) * (1 + strengths[1] * unsure)
    return shorter(float(weights.mean()), 6) if len(weights) else None


def agreement(run: RunFiles, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return, for each step, sums over the response tokens by agreement and outcome.

    A token is agreed on where the teacher finds it at least as likely as the student does. Each
    cell is [tokens, sum of A = log pi_T - log pi_S, sum of coefficient * weight * |A|]; cells are
    in the order right and agreed, right and not, wrong and agreed, wrong and not.
    """
    names = ("correct", "student_logprob", "teacher_logprob", "weight", "coefficient", "kept")
    found = []
    for file in files:
        table, step = run.table(file, names), step_of(file)
        if table is None or step is None or "teacher_logprob" not in table.column_names:
            continue
        cells = _cells(table)
        if cells is not None:
            found.append({"step": step, "cells": cells})
    return found


def _cells(table: pyarrow.Table) -> list[list[float]] | None:
    """Return the four cells of a step; None where nothing was graded."""
    correct = table["correct"].to_pylist() if "correct" in table.column_names else []
    if all(each is None for each in correct):
        return None
    lists = table["student_logprob"].combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    graded = np.repeat([each is not None for each in correct], lengths)
    right = np.repeat([bool(each) for each in correct], lengths)

    def flat(name: str) -> np.ndarray:
        return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    advantage = flat("teacher_logprob") - flat("student_logprob")
    share = np.abs(advantage) * flat("weight")
    if "coefficient" in table.column_names:
        share = share * flat("coefficient")
    else:
        share = share * np.repeat([bool(each) for each in table["kept"].to_pylist()], lengths)
    usable = graded & np.isfinite(advantage) & np.isfinite(share)
    agreed = advantage >= 0
    cells = []
    for outcome in (right, ~right):
        for side in (agreed, ~agreed):
            inside = usable & outcome & side
            sums = (inside.sum(), advantage[inside].sum(), share[inside].sum())
            cells.append([shorter(float(x), 6) for x in sums])
    return cells
