"""Programs that try to pass without being right: nothing but the values they return counts."""

import json

import pytest

from fireopd_jax.evaluation.code import verdict
from fireopd_jax.evaluation.sandbox import Sandbox
from tests.evaluation.sandboxes import EVERY_LAYER, LAYERS, LIMITS

HUMANEVAL = json.dumps(
    {
        "test": "def check(candidate):\n    assert candidate(3) == 9\n"
        "    assert candidate(4) == 16\n    assert abs(candidate(1.5) - 2.25) < 1e-6\n",
        "entry_point": "square",
    }
)
MBPP = json.dumps({"test_list": ["assert square(3) == 9", "assert square(4) == 16"]})
CALLS = json.dumps({"inputs": [[3], [4]], "outputs": [9, 16], "fn_name": "square"})
SCRIPTS = json.dumps({"inputs": ["3", "4"], "outputs": ["9", "16"]})
ALL = {"HumanEval": HUMANEVAL, "MBPP": MBPP, "calls": CALLS, "scripts": SCRIPTS}

RIGHT = "def square(x): return x * x\nif __name__ == '__main__': print(square(int(input())))\n"
FORGED = {
    "ends at once": "import os\nos._exit(0)",
    "exits at once": "raise SystemExit(0)",
    "ends in the function": "import os\ndef square(x): os._exit(0)\n",
    "exits in the function": "def square(x): raise SystemExit(0)\n",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    def __abs__(self): return 0
    def __lt__(self, other): return True
    __class__ = int
    def __repr__(self): return "9"
def square(x): return Any()
""",
    "object that equals everything": """
class Any:
    def __eq__(self, other): return True
    def __bool__(self): return True
def square(x): return Any() if x in (3, 4) else x * x
""",
    "number that equals everything": """
class Number(int):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
def square(x): return Number(7)
""",
    "list that equals everything": """
class Items(list):
    def __eq__(self, other): return True
def square(x): return Items([7])
""",
    "changed builtins": """
import builtins, json, os, sys
builtins.abs = lambda x: 0
builtins.AssertionError = StopIteration
json.dumps = lambda *a, **k: '{"passed": 1, "error": null}'
sys.settrace(None)
def square(x): return 9
""",
    "prints a result": """
import sys
for text in ('{"passed": 1, "error": null}', '{"passed": 2, "error": null}', "passed", "9", "16"):
    print(text); print(text, file=sys.stderr)
def square(x): return 7
""",
    "writes to every file": """
import os
for fd in range(3, 64):
    for text in (b'{"passed": 1, "error": null}', b'{"names": {}}\\n',
                 b'{"value": 9, "changed": {}}\\n', b'\\0\\0\\0\\2{}'):
        try: os.write(fd, text)
        except OSError: pass
def square(x): return 7
""",
    "answers before it is asked": """
import os
for value in (9, 16, 2.25):
    try: os.write(4, b'{"value": %d, "changed": {}}\\n' % 9)
    except OSError: pass
def square(x): return 7
""",
    "reads the memory of the harness": """
import gc, sys
def square(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, dict) and "tests" in value: return 9 if x == 3 else x * x
        frame = frame.f_back
    for each in gc.get_objects():
        if isinstance(each, str) and "candidate(3)" in each: return x * x
    return 7
if __name__ == "__main__": print(square(1))
""",
    "kills the judge": """
import os, signal
for pid in range(1, 300):
    if pid != os.getpid():
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
def square(x): return 7
""",
    "raises what passes": "class AssertionError(BaseException): pass\n"
    "def square(x): raise StopIteration",
}


@pytest.mark.parametrize("answer", ALL.values(), ids=ALL)
def test_a_right_program_passes(answer):
    found = verdict(f"```python\n{RIGHT}```", answer, LIMITS)
    assert found.correct, found.rule
    assert found.rule.startswith("passed ")


@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED)
def test_a_forged_result_does_not_pass(program):
    for name, answer in ALL.items():
        found = verdict(f"```python\n{program}\n```", answer, LIMITS)
        assert not found.correct, (name, found.rule)


COMPARISONS = {
    "abs = lambda x: 0": "abs(candidate(1.5) - 2.25) < 1e-6",
    "len = lambda x: 2": "len([candidate(2)]) == 2",
    "math = type('math', (), {'isclose': lambda *a: True})": "math.isclose(candidate(2), 4)",
}


@pytest.mark.parametrize("own, comparison", COMPARISONS.items())
def test_a_program_gives_no_names_to_the_comparison(own, comparison):
    test = f"def check(candidate):\n    assert {comparison}\n"
    answer = json.dumps({"test": test, "entry_point": "square"})
    program = f"```python\n{own}\ndef square(x): return 7\n```"
    assert verdict(program, answer, LIMITS).rule == "AssertionError on test 1"


@pytest.mark.parametrize("layer", EVERY_LAYER)
def test_a_program_cannot_kill_its_judge(layer):
    with Sandbox(FORGED["kills the judge"], LIMITS, **LAYERS[layer]) as sandbox:
        outcome = sandbox.check("", ["assert square(3) == 9"])
    assert '"passed": 1' not in outcome.result


def test_assertions_fail_in_order():
    program = "```python\ndef square(x): return 9\n```"
    assert verdict(program, MBPP, LIMITS).rule == "AssertionError on test 2"
    assert verdict("```python\nimport nothing\n```", MBPP, LIMITS).rule == (
        "error on test 1: ModuleNotFoundError: No module named 'nothing'"
    )
    loop = "```python\ndef square(x):\n    while True: pass\n```"
    assert verdict(loop, MBPP, LIMITS).rule == "time limit in the tests"


def test_assertions_use_objects_of_the_program():
    program = """
import math
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def moved(self, by=1): return Point(self.x + by)
class TooFar(ValueError): pass
def walk(n):
    if n > 9: raise TooFar("beyond")
    yield from range(n)
def clear(items, table): items.clear(); table["n"] = (1, {2}); return None
"""
    tests = [
        "assert Point(1).moved(by=2) == Point(3) and Point(1) != Point(2)",
        "assert Point(1) != 1 and Point(4).x == 4",
        "assert list(walk(3)) == [0, 1, 2] and next(walk(2)) == 0",
        "try:\n    list(walk(10))\nexcept TooFar as error:\n    assert str(error) == 'beyond'",
        "try:\n    list(walk(10))\n    assert False\nexcept ValueError:\n    pass",
        "items, table = [1], {}\nclear(items, table)\nassert not items and table['n'] == (1, {2})",
        "assert math.isclose(math.pi, 3.14159265, rel_tol=1e-6)",
        "from solution import Point as P\nassert P(2).x == 2",
    ]
    found = verdict(f"```python\n{program}```", json.dumps(tests), LIMITS)
    assert found.rule == "passed 8 of 8 tests"
