"""Grading of programs: layouts of tests, the program of a response, comparison, rules."""

import json

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.evaluation.code import (
    program_of,
    same_output,
    same_value,
    verdict,
    verdicts,
)
from fireopd_jax.evaluation.code_tests import Assertions, CallTest, ScriptTest, read_tests
from tests.evaluation.sandboxes import LIMITS, QUICK

SUM = "a, b = map(int, input().split())\nprint(a + b)"
SOLUTION = "class Solution:\n    def add(self, a: List[int], b) -> int:\n        return sum(a) + b"
ADD = "def add(a, b):\n    return sum(a) + b"

LAYOUTS = {
    "APPS": (SUM, {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}, 2),
    "APPS lines": (SUM, {"inputs": [["1 2"]], "outputs": [["3"]]}, 1),
    "APPS function": (SOLUTION, {"fn_name": "add", "inputs": [[[1, 2], 3]], "outputs": [[6]]}, 1),
    "verl": (SUM, json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"], "fn_name": None}), 1),
    "verl function": (ADD, {"fn_name": "add", "inputs": ["[1, 2]\n3"], "outputs": ["6"]}, 1),
    "HumanEval": (
        ADD,
        {
            "test": "METADATA = {}\ndef check(candidate):\n    assert candidate([1], 2) == 3\n",
            "entry_point": "add",
        },
        1,
    ),
    "MBPP": (
        ADD,
        {"test_list": ["assert add([1], 2) == 3"] * 3, "test_setup_code": "", "challenge": []},
        3,
    ),
    "MBPP sanitized": (
        ADD,
        {"test_imports": ["import math"], "test_list": ["assert add([1], 2) == math.floor(3.5)"]},
        1,
    ),
    "assertions": (ADD, ["assert add([1], 2) == 3", "assert add([], 2) == 2"], 2),
    "LiveCodeBench": (SUM, [{"input": "1 2", "output": "3", "testtype": "stdin"}] * 2, 2),
    "LiveCodeBench function": (
        SOLUTION,
        [
            {
                "input": "[1, 2]\n3",
                "output": "6",
                "testtype": "functional",
                "metadata": {"func_name": "add"},
            }
        ],
        1,
    ),
    "PrimeIntellect": (
        ADD,
        {
            "language": "python",
            "test_cases": [
                {"type": "function_call", "fn_name": "add", "input": [[1], 2], "output": [3]},
            ],
        },
        1,
    ),
    "KodCode": (
        ADD,
        {
            "test": "from solution import add\n\ndef test_one():\n    assert add([1], 2) == 3\n"
            "\ndef test_two():\n    assert add([], 0) == 0\n"
        },
        2,
    ),
}


@pytest.mark.parametrize("program, tests, count", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layouts_of_public_data(program, tests, count):
    answer = json.dumps(tests)
    right = verdict(f"Here:\n```python\n{program}\n```", answer, LIMITS)
    assert (right.correct, right.rule) == (True, f"passed {count} of {count} tests")
    wrong = program.replace("+ b", "- b")
    assert not verdict(f"```python\n{wrong}\n```", answer, LIMITS).correct


BAD = {
    "plain text": ("42 apples", "no JSON"),
    "number": ("42", "inputs and outputs"),
    "wrong key": ('{"input": [], "outputs": []}', "did you mean 'inputs'"),
    "lengths": ('{"inputs": ["1"], "outputs": []}', "1 inputs and 0 outputs"),
    "empty": ('{"inputs": [], "outputs": []}', "empty"),
    "no Python": ('["assert f(1 = 2"]', "no Python"),
    "import": ('["import torch"]', "import torch"),
    "no name": ('[{"input": "1", "output": "2", "testtype": "functional"}]', "func_name"),
    "no text": ('{"test_list": [3]}', "an assertion is a text"),
    "arguments": ('{"inputs": [3], "outputs": [3], "fn_name": "f"}', "arguments of f are a list"),
    "input": ('{"inputs": [{"a": 1}], "outputs": ["3"]}', "are texts"),
    "lines": ("assert f(1)\nassert f(2)\n" * 9, "no JSON"),
    "deep": ("[" * 100_000, "no JSON"),
}


@pytest.mark.parametrize("answer, words", BAD.values(), ids=BAD)
def test_an_answer_without_tests_is_named_in_one_line(answer, words):
    with pytest.raises(UserError, match=words) as caught:
        verdict("```python\npass\n```", answer)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_tests_are_read_into_types():
    assert read_tests('{"inputs": ["1"], "outputs": [2]}') == (ScriptTest("1", "2"),)
    keys = '{"inputs": [[{"1": 2}]], "outputs": [[1]], "fn_name": "f"}'
    assert read_tests(keys) == (CallTest("f", [{1: 2}], [1]),)
    assert read_tests('["assert f()"]') == Assertions("", ("assert f()",))


PROGRAMS = {
    "last fence": ("```python\na\n```\nand\n```python\nb\n```", "b\n"),
    "marked fence before output": ("```python\na\n```\nprints\n```\n5\n```", "a\n"),
    "unmarked fence": ("```\na\n```", "a\n"),
    "py3 fence": ("```Python3\na\n```", "a\n"),
    "no fence": ("print(1)\n", "print(1)"),
    "cut off": ("```python\nprint(1)", ""),
    "cut off after a whole one": ("```python\na\n```\nbetter:\n```python\nb", "a\n"),
    "indented": ("1. So:\n   ```python\n   if 1:\n       a\n   ```", "if 1:\n    a\n"),
    "deeper than its fence": ("  ```py\n    a\n  b\n c\n  ```", "  a\nb\nc\n"),
    "fence of four": ('````python\na = """\n```\n"""\n````', 'a = """\n```\n"""\n'),
    "words after the language": ("```python title=a.py\na\n```", "a\n"),
    "code in a line": ("Use ```print(1)``` so:\n```python\na\n```", "a\n"),
    "carriage returns": ("```python\r\na\r\n```\r\n", "a\n"),
    "odd line breaks": ("```python\na = '\x0c\u2028'\n```", "a = '\x0c\u2028'\n"),
    "in a thought": ("<think>\n```python\na\n```\n</think>\nI do not know.", "I do not know."),
    "after a thought": ("<think>\n```python\na\n```</think>\n```python\nb\n```", "b\n"),
    "thought without end": ("<think>\n```python\na\n```", ""),
    "end of a thought alone": ("```python\na\n```</think>```python\nb\n```", "b\n"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("response, program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_program_of_a_response(response, program):
    assert program_of(response) == program


OUTPUTS = [
    ("3\n", "3", True),
    ("  1   2 \n\n3\n", "1 2\n3", True),
    ("1 2 3", "1 2\n3", False),
    ("0.3333333", "0.33333334", True),
    ("1e-3", "0.001", True),
    ("0.334", "0.333", False),
    ("1000000000001", "1000000000000", False),
    ("007", "7", True),
    ("Yes", "YES", False),
    ("nan", "nan", True),
    ("1" * 500, "1" * 499 + "2", False),
    ("", "0", False),
]


@pytest.mark.parametrize("output, expected, same", OUTPUTS)
def test_outputs_are_compared_word_by_word(output, expected, same):
    assert same_output(output, expected) == same


VALUES = [
    ([1, [2, "a"]], [1, [2, "a"]], True),
    (0.1 + 0.2, 0.3, True),
    (2, 2.0, True),
    (10**400, 1.5, False),
    ("1", 1, False),
    ([1], 1, False),
    ({"a": 0.3}, {"a": 0.1 + 0.2}, True),
    ({"a": 1}, {"b": 1}, False),
    (None, False, False),
]


@pytest.mark.parametrize("result, expected, same", VALUES)
def test_results_are_compared_by_value(result, expected, same):
    assert same_value(result, expected) == same


RULES = {
    "while True: pass": "time limit on test 1",
    "import time\ntime.sleep(99)": "time limit on test 1",
    "x = [0] * 10**9": "memory limit on test 1",
    "while True: print('x' * 999)": "output limit on test 1",
    "print(3 if input() == '1 2' else 8)": "wrong output on test 2",
    "print(3 if input() == '1 2' else None + 1)": "error on test 2: TypeError: unsupported operand"
    " type(s) for +: 'NoneType' and 'int'",
    "print(3)\nraise SystemExit(1)": "error on test 1: exit code 1",
    "print(": "error on test 1: SyntaxError: '(' was never closed",
    "import ctypes\nctypes.string_at(0)": "signal 11 on test 1",
}


@pytest.mark.parametrize("program, rule", RULES.items())
def test_a_verdict_states_its_rule(program, rule):
    answer = json.dumps({"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]})
    found = verdict(f"```python\n{program}\n```", answer, QUICK if "sleep" in program else LIMITS)
    assert (found.correct, found.rule) == (False, rule)
    assert verdict("<think>", answer).rule == "no program in the response"


def test_a_rule_is_one_printable_line():
    odd = "```python\nraise ValueError('\\x1b[31mred\\nline \\ud800')\n```"
    scripts = json.dumps({"inputs": ["\ud800\udfff"], "outputs": ["1"]})
    for answer in (
        scripts,
        '["assert f() == 1"]',
        '{"inputs": [[]], "outputs": [1], "fn_name": "f"}',
    ):
        rule = verdict(odd, answer, LIMITS).rule
        assert rule.isprintable()
        assert rule.startswith("error on test 1")
    for program in ("\0", "\ud800", "é = 1\nprint(é)"):
        assert verdict(f"```python\n{program}\n```", scripts, LIMITS).correct == ("é" in program)


def test_function_results_state_their_rule():
    answer = json.dumps({"inputs": [[1]], "outputs": [[1, 2]], "fn_name": "f"})
    rules = {
        "def f(x): return (1, 2)": "passed 1 of 1 tests",
        "def f(x): return [1]": "wrong result on test 1",
        "def f(x): return {1, 2}": "error on test 1: TypeError: the result holds a set, which"
        " tests cannot compare",
        "def g(x): return 1": "error on test 1: NameError: the program defines no function 'f'",
        "exit()": "no result on test 1",
    }
    for program, rule in rules.items():
        assert verdict(f"```python\n{program}\n```", answer, LIMITS).rule == rule


def test_a_base_model_continues_the_prompt():
    prompt = 'import math\n\ndef root(x):\n    """Return the root."""\n'
    test = "def check(candidate):\n    assert candidate(9) == 3\n"
    answer = json.dumps({"prompt": prompt, "test": test, "entry_point": "root"})
    assert verdict("    return math.isqrt(x)\n", answer, LIMITS).correct
    chat = "```python\ndef root(x):\n    return math.isqrt(x)\n```"
    assert verdict(chat, answer, LIMITS).correct
    assert not verdict("    return x\n", answer, LIMITS).correct


def test_many_responses_are_graded_in_their_order():
    answer = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
    responses = [f"```python\nprint({number})\n```" for number in range(6)]
    found = verdicts(responses, [answer] * 6, LIMITS, workers=3)
    assert [each.correct for each in found] == [number == 3 for number in range(6)]
    with pytest.raises(UserError, match="no JSON"):
        verdicts(["a", "b"], [answer, "x"])
