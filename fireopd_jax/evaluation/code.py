"""Grading of programs: the program of a response passes the tests of the answer, or does not.

    response -> program_of -> Sandbox -> [outcome of a test -> fault?] -> Verdict

The expected outputs and results stay in this process: a program is given inputs, and what it
prints or returns is compared here. Assertions run in another process than the program
(`jail/assertions.py`). A program therefore passes by its values alone, not by ending early, by
printing a result or by searching its memory.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fireopd_jax.evaluation.answers import without_thinking
from fireopd_jax.evaluation.code_tests import Assertions, CallTest, ScriptTest, read_tests
from fireopd_jax.evaluation.jail.assertions import PROGRAM_ENDED
from fireopd_jax.evaluation.sandbox import DEFAULT, Limits, Outcome, Sandbox
from fireopd_jax.evaluation.verdict import Verdict

PYTHON = ("python", "py", "python3")
FENCE = "```"
OPENING = re.compile(r"(?P<indent>[ \t]*)(?P<ticks>`{3,})(?P<info>[^`]*)")
CLOSING = re.compile(r"[ \t]*`{3,}\s*")
TOLERANCE = 1e-6
"""Of numbers with a fraction or an exponent, relative and absolute."""
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
LONGEST_NUMBER = 64
MOST_WORKERS = 8


def verdict(response: str, answer: str, limits: Limits = DEFAULT) -> Verdict:
    """Return whether the program in a response passes all tests of the answer, and why not.

    Raises UserError for an answer that holds no tests (`read_tests` has the layouts).
    """
    tests = read_tests(answer)
    program = program_of(response)
    if not program:
        return Verdict(False, "no program in the response")
    if isinstance(tests, Assertions):
        return _asserted(_with_prompt(program, response, tests), tests, limits)
    with Sandbox(program, limits) as sandbox:
        for number, test in enumerate(tests, start=1):
            if isinstance(test, ScriptTest):
                fault = script_fault(sandbox.script(test.stdin), test)
            else:
                fault = call_fault(sandbox.call(test.function, test.arguments), test)
            if fault:
                return Verdict(False, _rule(fault, number))
    return Verdict(True, f"passed {len(tests)} of {len(tests)} tests")


def verdicts(
    responses: Sequence[str],
    answers: Sequence[str],
    limits: Limits = DEFAULT,
    workers: int | None = None,
) -> list[Verdict]:
    """Return the verdicts of many responses, a few at a time: by default one per processor."""
    for answer in answers:
        read_tests(answer)  # The mistake of an answer, before any program runs.
    workers = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="code") as pool:
        return list(pool.map(lambda r, a: verdict(r, a, limits), responses, answers))


def program_of(response: str) -> str:
    """Return the program of a response; empty if there is none.

    The last closed fence that is marked as Python, else the last closed fence, else the whole text
    where it has no fence. A fence that is never closed is a response that was cut off.
    """
    text = without_thinking(response)
    blocks, opened = _blocks(text)
    marked = [body for language, body in blocks if language in PYTHON]
    if blocks:
        return (marked or [blocks[-1][1]])[-1]
    return "" if opened else text.strip()


def _blocks(text: str) -> tuple[list[tuple[str, str]], bool]:
    """Return (language, body) of each closed fence, and whether one remains open."""
    blocks: list[tuple[str, str]] = []
    opened, body = None, []
    for line in text.replace("\r\n", "\n").split("\n"):
        if opened is None:
            opened, body = OPENING.fullmatch(line), []
        elif CLOSING.fullmatch(line) and line.count("`") >= len(opened["ticks"]):
            language = (opened["info"].split() or [""])[0]
            blocks.append((language.lower(), "".join(f"{each}\n" for each in body)))
            opened = None
        else:
            body.append(_without_indent(line, len(opened["indent"])))
    return blocks, opened is not None


def _without_indent(line: str, width: int) -> str:
    """Return a line of a fence that is indented, as in a list, by `width` spaces."""
    return line[min(width, len(line) - len(line.lstrip(" \t"))) :]


def _with_prompt(program: str, response: str, tests: Assertions) -> str:
    """Return a program after its prompt, which a base model continues within the function."""
    if not tests.prompt or "from __future__" in program:  # Which stands first, or not at all.
        return program
    text = without_thinking(response)
    if FENCE not in text and f"def {tests.entry_point}" not in text:
        return tests.prompt + text
    return f"{tests.prompt}\n{program}"


def _asserted(program: str, tests: Assertions, limits: Limits) -> Verdict:
    """Return the verdict of assertions."""
    with Sandbox(program, limits) as sandbox:
        outcome = sandbox.check(tests.setup, tests.tests)
    if outcome.limit or not outcome.result:
        return Verdict(False, _rule(_ended(outcome) or "no result", None))
    result = json.loads(outcome.result)
    passed, count = result["passed"], len(tests.tests)
    if passed == count and result["error"] is None:
        return Verdict(True, f"passed {count} of {count} tests")
    # The program's own error, where it did not even load, says more than the end of its process.
    if result["error"] == PROGRAM_ENDED and outcome.error:
        return Verdict(False, _rule(f"error: {outcome.error}", passed + 1))
    return Verdict(False, _rule(result["error"], passed + 1))


def _rule(fault: str, number: int | None) -> str:
    """Return the rule of a fault: "time limit on test 2", "error on test 1: NameError: ..."."""
    where = "in the tests" if number is None else f"on test {number}"
    what, colon, detail = fault.partition(":")
    # The words of an error are the program's: one line, without control characters.
    detail = "".join(each if each.isprintable() else " " for each in detail)
    return f"{what} {where}{colon}{detail}"


def _ended(outcome: Outcome) -> str:
    """Return how a program ended that has no result to compare; empty if it ended well."""
    if outcome.limit == "end":
        return "end of the sandbox"
    if outcome.limit:
        return f"{outcome.limit} limit"
    if outcome.error.startswith("MemoryError"):
        return "memory limit"
    if outcome.exit_code < 0:
        return f"signal {-outcome.exit_code}"
    if outcome.exit_code:
        return f"error: {outcome.error or f'exit code {outcome.exit_code}'}"
    return ""


def script_fault(outcome: Outcome, test: ScriptTest) -> str:
    """Return what is wrong with an output; empty if nothing is."""
    return _ended(outcome) or ("" if same_output(outcome.stdout, test.expected) else "wrong output")


def call_fault(outcome: Outcome, test: CallTest) -> str:
    """Return what is wrong with the result of a function; empty if nothing is."""
    if ended := _ended(outcome):
        return ended
    try:
        result = json.loads(outcome.result)
        # Some data sets wrap every expected result in a list.
        right = same_value(result, test.expected) or (
            isinstance(test.expected, list)
            and len(test.expected) == 1
            and same_value(result, test.expected[0])
        )
    except (ValueError, RecursionError):
        return "no result"
    return "" if right else "wrong result"


def same_output(output: str, expected: str) -> bool:
    """Return whether two outputs have equal words line by line, apart from empty lines.

    Numbers with a fraction or an exponent may differ by `TOLERANCE`; whole numbers may not.
    """
    found, wanted = _words(output), _words(expected)
    return len(found) == len(wanted) and all(
        len(left) == len(right) and all(map(_same_word, left, right))
        for left, right in zip(found, wanted, strict=True)
    )


def _words(text: str) -> list[list[str]]:
    return [words for line in text.splitlines() if (words := line.split())]


def _same_word(left: str, right: str) -> bool:
    if left == right:
        return True
    if max(len(left), len(right)) > LONGEST_NUMBER:
        return False
    if not (NUMBER.fullmatch(left) and NUMBER.fullmatch(right)):
        return False
    if left.lstrip("+-").isdecimal() and right.lstrip("+-").isdecimal():
        return int(left) == int(right)
    return _close(float(left), float(right))


def same_value(result: Any, expected: Any) -> bool:
    """Return whether two JSON values are equal; floats may differ by `TOLERANCE`."""
    if isinstance(result, list) and isinstance(expected, list):
        return len(result) == len(expected) and all(map(same_value, result, expected))
    if isinstance(result, dict) and isinstance(expected, dict):
        return result.keys() == expected.keys() and all(
            same_value(value, expected[key]) for key, value in result.items()
        )
    if isinstance(result, float) and isinstance(expected, int | float):
        return _close(result, expected)
    if isinstance(expected, float) and isinstance(result, int):
        return _close(result, expected)
    return result == expected


def _close(left: int | float, right: int | float) -> bool:
    try:
        return math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # A whole number beyond the floats.
        return False
