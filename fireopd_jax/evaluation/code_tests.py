"""Tests of programs, in the layouts that public data has.

    answer (JSON) -> read_tests -> scripts with expected output | calls with expected result
                                   | assertions

| layout | keys |
|---|---|
| APPS, TACO, verl | `{"inputs": [...], "outputs": [...], "fn_name": optional}` |
| HumanEval | `{"test": "def check(candidate): ...", "entry_point": name, "prompt": optional}` |
| KodCode | `{"test": "from solution import f; def test_...(): ..."}` |
| MBPP | `{"test_list": ["assert ..."], "test_setup_code" or "test_imports": optional}` |
| assertions | `["assert ...", ...]` |
| LiveCodeBench, DeepCoder | `[{"input", "output", "testtype", "metadata": {"func_name"}}, ...]` |
| PrimeIntellect | `{"test_cases": [{"type", "fn_name", "input", "output"}, ...]}` |
"""

import ast
import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fireopd_jax.config import UserError, nearest
from fireopd_jax.evaluation.sandbox import DEFAULT
from fireopd_jax.runtime.limits import parse_json

LAYOUTS = (
    "inputs and outputs, test and entry_point, test_list, test_cases, a list of assertions, or a "
    "list of input and output"
)
KEYS = ("inputs", "outputs", "fn_name", "test", "entry_point", "test_list", "test_cases")
SCRIPT_KINDS = ("stdin", "stdin_stdout")
"""Kinds of tests that run a program as a script; every other calls a function."""


@dataclasses.dataclass(frozen=True)
class ScriptTest:
    """What a program prints for a standard input."""

    stdin: str
    expected: str


@dataclasses.dataclass(frozen=True)
class CallTest:
    """What a function returns for arguments."""

    function: str
    arguments: Sequence[Any]
    expected: Any


@dataclasses.dataclass(frozen=True)
class Assertions:
    """Python that raises where the functions of a program are wrong."""

    setup: str
    tests: tuple[str, ...]
    prompt: str = ""
    """Begin of the program: imports and helpers, and the head of a function that a base model
    continues."""
    entry_point: str = ""
    """Function that the prompt begins."""


Tests = tuple[ScriptTest | CallTest, ...] | Assertions


@functools.lru_cache(maxsize=64)
def read_tests(answer: str) -> Tests:
    """Return the tests of a gold answer; raise UserError if it is in none of the layouts."""
    data = _json(answer)
    if isinstance(data, str):  # Encoded twice, as some data sets do.
        data = _json(data)
    tests = _tests(data)
    if not (tests.tests if isinstance(tests, Assertions) else tests):
        raise UserError(f"the tests of a program are empty: {_shown(answer)}")
    return tests


def _tests(data: Any) -> Tests:
    """Return the tests of decoded JSON."""
    match data:
        case {"inputs": list(inputs), "outputs": list(outputs), **rest}:
            if len(inputs) != len(outputs):
                raise UserError(
                    f"the tests of a program have {len(inputs)} inputs and {len(outputs)} outputs"
                )
            name = rest.get("fn_name")
            return tuple(_test(*pair, name) for pair in zip(inputs, outputs, strict=True))
        case {"test": str(test), "entry_point": str(name), **rest}:
            call = f"{test}\ncheck({name})\n"
            return _assertions("", [call], rest.get("prompt") or "", name)
        case {"test": str(test)} if calls := _test_functions(test):
            return _assertions(test, calls)
        case {"test_list": list(tests), **rest}:
            imports = rest.get("test_imports") or []
            setup = "\n".join([*imports, rest.get("test_setup_code") or ""])
            return _assertions(setup, tests)
        case {"test_cases": list(cases)} if all(isinstance(each, Mapping) for each in cases):
            return tuple(map(_case, cases))
        case [str(), *_] if all(isinstance(each, str) for each in data):
            return _assertions("", data)
        case [{"input": _, "output": _}, *_]:
            return tuple(map(_case, data))
    unknown = next((key for key in data if key not in KEYS), "") if isinstance(data, dict) else ""
    raise UserError(
        f"the tests of a program are {LAYOUTS}, not {_shown(json.dumps(data))}"
        f"{nearest(unknown, KEYS)}"
    )


def _case(case: Any) -> ScriptTest | CallTest:
    """Return a test that states its own kind."""
    match case:
        case {"input": given, "output": expected, **rest}:
            metadata = rest.get("metadata")
            named = metadata if isinstance(metadata, Mapping) else {}
            name = rest.get("fn_name") or named.get("func_name")
            kind = rest.get("testtype") or rest.get("type")
            if kind in SCRIPT_KINDS or not (kind or name):
                return _test(given, expected, None)
            if not name:
                raise UserError(
                    "a test of a function names it in metadata.func_name or fn_name:"
                    f" {_shown(case)}"
                )
            return _test(given, expected, name)
    raise UserError(f"a test of a program has input and output, not {_shown(case)}")


def _test(given: Any, expected: Any, function: str | None) -> ScriptTest | CallTest:
    """Return a test of a script, or of a function if it is named."""
    if function is None:
        return ScriptTest(_lines(given), _lines(expected))
    if isinstance(given, str):  # One argument a line, each JSON, and so the result.
        arguments = [_json(line) for line in given.split("\n") if line.strip()]
        result = _json(expected) if isinstance(expected, str) else expected
        return CallTest(function, arguments, result)
    if not isinstance(given, list):
        raise UserError(f"the arguments of {function} are a list, not {_shown(given)}")
    return CallTest(function, [_with_whole_keys(each) for each in given], expected)


def _lines(value: Any) -> str:
    """Return a text; lists of lines, as APPS has some, are joined."""
    if isinstance(value, list):
        return "\n".join(map(_lines, value))
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f"the input and output of a program are texts, not {_shown(value)}")


def _with_whole_keys(value: Any) -> Any:
    """Return an argument whose keys are whole numbers, which JSON can only write as texts."""
    if isinstance(value, dict) and value and all(_is_whole(key) for key in value):
        return {int(key): each for key, each in value.items()}
    return value


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _assertions(
    setup: str, tests: Sequence[Any], prompt: str = "", entry_point: str = ""
) -> Assertions:
    """Return assertions that are Python and import what there is; else raise UserError."""
    for source in (setup, *tests):
        if not isinstance(source, str):
            raise UserError(f"an assertion is a text, not {_shown(source)}")
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise UserError(
                f"the tests of a program are no Python ({error.msg}): {_shown(source)}"
            ) from None
        for name in _imports(tree):
            if name not in (*sys.stdlib_module_names, *DEFAULT.packages, "solution"):
                raise UserError(
                    f"the tests of a program import {name}; there is the standard library and"
                    f" {', '.join(DEFAULT.packages)}: {_shown(source)}"
                )
    return Assertions(setup, tuple(tests), prompt, entry_point)


def _test_functions(source: str) -> list[str]:
    """Return calls of the functions `test_...` of a source; none if it is no Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [f"{name}()" for name in names if name.startswith("test")]


def _imports(tree: ast.AST) -> list[str]:
    """Return the top-level names of imported modules."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module.split(".")[0])
    return names


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"the tests of a program are no JSON ({error}): {_shown(text)}") from None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    line = " ".join(text[:200].split())
    return line if len(line) <= 80 else f"{line[:77]}..."
