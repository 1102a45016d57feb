r"""Grades: does a response have the gold answer, and which rule says so?

    response, answer, kind -> final answers -> values -> Verdict(correct, rule, plain)

Kinds: `math` by value (`values.py`, with math-verify for formulas), `exact` by text, `choice` by
letter, `code` by running tests (`code.py`), and the dotted name of a function of one's own.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fireopd_jax.config import UserError, nearest
from fireopd_jax.data.sources import Row
from fireopd_jax.evaluation import builtin, choice, code
from fireopd_jax.evaluation.answers import last_mark, stated, without_thinking
from fireopd_jax.evaluation.builtin import BUILTIN_FORM
from fireopd_jax.evaluation.code_tests import read_tests
from fireopd_jax.evaluation.equality import equal
from fireopd_jax.evaluation.numbers import written
from fireopd_jax.evaluation.sandbox import strongest
from fireopd_jax.evaluation.spelling import spelled, undelimited, without_bold
from fireopd_jax.evaluation.symbolic import plain, symbolic
from fireopd_jax.evaluation.values import balanced, parse, unwrapped
from fireopd_jax.evaluation.verdict import Verdict

KINDS = ("math", "exact", "choice", "code")
BUILTIN = "built-in task"
"""The kind of the rows of built-in tasks: maths by the rule of `builtin.py`."""

Grader = Callable[[str, str], Any]


def grade(response: str, answer: str, kind: str = "math") -> bool:
    """Return whether a response is correct; see `verdict`."""
    return (
        _math(response, answer).correct
        if kind == "math"
        else verdict(response, answer, kind).correct
    )


def verdict(response: str, answer: str, kind: str = "math") -> Verdict:
    """Return whether a response is correct, and which rule decided.

    `answer` may be bare, or a worked solution that marks its final answer with `####` or a box; for
    `code` it is the JSON of the tests. Raises UserError for an unknown kind.
    """
    if kind == "math":
        found = _math(response, answer)
        if (
            not answer.strip()
            or BUILTIN_FORM.fullmatch(response)
            or found.rule.endswith("too large")
        ):
            return found
        return Verdict(found.correct, found.rule, plain(gold_answer(answer), response))
    if kind == BUILTIN:
        return Verdict(builtin.grade(response, answer), BUILTIN)
    if kind == "exact":
        return _exact(response, answer)
    if kind == "choice":
        return _choice(response, answer)
    if kind == "code":
        return code.verdict(response, answer)
    return _own(kind, response, answer)


def verdicts(
    responses: Sequence[str], answers: Sequence[str], kinds: Sequence[str]
) -> list[Verdict]:
    """Return the verdicts of many responses; programs are run several at a time."""
    programs = [index for index, kind in enumerate(kinds) if kind == "code"]
    ran = code.verdicts([responses[i] for i in programs], [answers[i] for i in programs])
    found = dict(zip(programs, ran, strict=True))
    return [
        found[index] if index in found else verdict(*one)
        for index, one in enumerate(zip(responses, answers, kinds, strict=True))
    ]


def kind_of(row: Row, kind: str) -> str:
    """Return the kind that grades a row: `kind`, but for maths of a built-in task `BUILTIN`."""
    return BUILTIN if kind == "math" and row.origin.startswith("builtin:") else kind


def final_answer(response: str, kind: str = "math") -> str:
    """Return the final answer of a response in normal spelling; empty if there is none.

    Equal numbers are written alike, without their units: `0.50`, `1/2` and `$0.5` are `0.5`.
    """
    if kind == BUILTIN:
        return builtin.final_answer(response)
    if kind == "choice":
        return ", ".join(sorted(choice.chosen(response)))
    text, _ = _stated(response)
    if kind == "exact":
        return _plain_text(text)
    found = parse(spelled(text))
    return written(found.number) if found.number else builtin.normal(spelled(text))


def same_answer(a: str, b: str, kind: str = "math") -> bool:
    """Return whether two responses state the same final answer; none equals none."""
    one, two = final_answer(a, kind), final_answer(b, kind)
    if kind != "math":
        return one == two != ""
    return bool(one and two) and equal(parse(one), parse(two), symbolic)[0]


def gold_answer(answer: str) -> str:
    """Return the final answer of a gold answer, which is bare or a worked solution."""
    marked = last_mark(answer)
    return answer.strip() if marked is None else marked[0]


def unreadable(answer: str, kind: str = "math") -> str | None:
    """Return why no response, or none but its copy, can match a gold answer; None if some can."""
    gold = answer if kind == "code" else gold_answer(answer)
    if not answer.strip():
        return "it is empty"
    if not gold.strip():
        return "it has a mark without an answer"
    if kind == "code":
        try:
            read_tests(answer)
        except UserError as error:
            return str(error)
    if kind == "math" and not balanced(gold):
        return "its brackets do not match"
    if kind == "choice" and choice.letters(gold) is None:
        return "it is no letter from A to J"
    return None


def check_kind(kind: str, key: str = "data.grader") -> None:
    """Raise UserError for a kind of grader that does not exist, or that cannot work here."""
    if kind == "code":
        strongest()
    if kind not in KINDS:
        own_grader(kind, key)


def own_grader(name: str, key: str = "data.grader") -> Grader:
    """Return the user's function of a dotted name; the current folder is searched too."""
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(
            f"{key}: unknown kind {name!r}; expected {', '.join(KINDS)}, or the dotted name "
            f"of a function{nearest(name, KINDS)}"
        )
    here = os.getcwd()
    searched = here not in sys.path
    if searched:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # Whatever the user's module raises.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{key}: {name!r} cannot be imported: {reason}") from error
    finally:
        if searched:
            sys.path.remove(here)
    if not callable(found):
        raise UserError(f"{key}: {name!r} is no function, but {type(found).__name__}")
    return found


def _own(name: str, response: str, answer: str) -> Verdict:
    try:
        found = own_grader(name)(response, answer)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"data.grader: {name} raised {reason} on response {_short(response)}, "
            f"answer {_short(answer)}"
        ) from error
    if not (isinstance(found, bool | np.bool_) or found in (0, 1)):
        raise UserError(
            f"data.grader: {name} returned {_short(found)}; expected True or False "
            f"(on response {_short(response)}, answer {_short(answer)})"
        )
    return Verdict(bool(found), name)


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _stated(response: str) -> tuple[str, str]:
    if BUILTIN_FORM.fullmatch(response):
        return builtin.final_answer(response), "digits"
    return stated(response)


def _math(response: str, answer: str) -> Verdict:
    gold = gold_answer(answer)
    text, where = _stated(response)
    if not gold.strip():
        return Verdict(False, "no gold answer")
    if not text.strip():
        return Verdict(False, "no answer")
    if builtin.normal(gold) == builtin.normal(text):
        return Verdict(True, f"{where}: text")
    if (letter := choice.letters(gold)) and (found := choice.letters(text)):
        return Verdict(letter == found, f"{where}: choice")
    correct, how = equal(parse(spelled(gold)), parse(spelled(text)), symbolic)
    return Verdict(correct, f"{where}: {how}")


def _exact(response: str, answer: str) -> Verdict:
    gold = _plain_text(gold_answer(answer))
    whole = " ".join(without_thinking(response).split())
    if not gold:
        return Verdict(False, "no gold answer")
    if whole == " ".join(answer.split()):
        return Verdict(True, "whole text")
    text, where = stated(response)
    return Verdict(_plain_text(text) == gold, f"{where}: text" if where else "no answer")


def _plain_text(text: str) -> str:
    r"""Return a text with single spaces, without bold, `$...$`, `\text{}` and a final period."""
    return unwrapped(undelimited(" ".join(without_bold(text).split())))


def _choice(response: str, answer: str) -> Verdict:
    gold = choice.letters(gold_answer(answer))
    if gold is None:
        return _exact(response, answer)
    found = choice.chosen(response)
    return Verdict(found == gold, "choice" if found else "no answer")
