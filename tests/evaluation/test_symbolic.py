"""math-verify in its own process: equal formulas, and what no formula can do to a run."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.evaluation import symbolic
from fireopd_jax.evaluation.graders import final_answer, grade, same_answer, verdict
from fireopd_jax.evaluation.symbolic import Worker, too_large, worker

MONSTROUS = [
    "10^{10^{10}}",
    "9^{9^{9^9}}",
    "9^9^9^9",
    "2^{99999999}",
    "99999999!",
    "((9!)!)!",
    "9!!!!",
    r"\frac{1}{" * 40 + "2" + "}" * 40,
    "9" * 500,
    "x+" * 600,
]
LONG = [
    "{" * 10**6,
    r"\boxed{" * 10**5,
    "1 or " * 10**5,
    "$" * 10**6,
    "<think>" * 10**5,
    "<answer>" * 10**5,
    "#### 1\n" * 10**5,
    "9" * 10**6,
    r"\boxed{" + "9" * 10**5 + "}",
    "The answer is " * 10**5,
    "\n" * 10**6,
    "\\" * 10**6,
    r"\boxed{" + "1," * 10**5 + "}",
    r"\boxed{1} and " * 10**4,
    "\ud800",
    "{" * 9999,
    "\\boxed{" * 999,
    "#" * 99,
    "$,.;-",
    "1,,2",
    "٣",
    "\\text{" * 999,
    r"\boxed{\pm\pm}",
    r"\boxed{1/0}",
    r"\boxed{1e999999999}",
    r"\boxed{1e-1000}",
    r"\boxed{1." + "3" * 990 + "e-999}",
    r"\boxed{1_{99}}",
]


def test_formulas_are_compared_in_either_order():
    assert worker().ask(gold="x^2-1", answer="(x-1)(x+1)", whole=False) is True
    assert worker().ask(gold="(x-1)(x+1)", answer="x^2-1", whole=False) is True
    assert worker().ask(gold="x^2-1", answer="x^2+1", whole=False) is False
    assert worker().ask(gold=r"\frac{", answer="1", whole=False) is False


@pytest.mark.parametrize("formula", MONSTROUS, ids=lambda formula: formula[:12])
def test_monstrous_formulas_are_refused_on_sight(formula, monkeypatch):
    monkeypatch.setattr(symbolic, "worker", None)
    assert too_large(formula)
    found = verdict(rf"\boxed{{{formula}}}", "x+5")
    assert (found.correct, found.plain) == (False, None)
    assert grade(rf"\boxed{{{formula}}}", formula)


@pytest.mark.parametrize("formula", ["2^{2010}", "2024!", "x^{2^{n}}", "10^{100}", "x^2 + y^2"])
def test_large_formulas_of_real_answers_are_not_refused(formula):
    assert not too_large(formula)


@pytest.mark.parametrize("text", LONG, ids=lambda text: ascii(text[:12]))
def test_no_text_hangs_the_grader_or_makes_it_raise(text):
    start = time.process_time()
    assert grade(text, "85") is False and grade("85", text) is False
    assert grade(text, "85", "choice") is False and grade(text, "85", "exact") is False
    assert isinstance(final_answer(text), str) and same_answer(text, "85") is False
    assert time.process_time() - start < 10


def test_a_comparison_that_takes_too_long_ends_and_the_next_one_is_answered():
    own = Worker()
    slow = r"\int_0^1 \sin(x^x) e^{x^x} dx"
    assert own.ask(gold=slow, answer="x", whole=False, limit_s=0.2) is None
    process = own._process
    assert own.ask(gold="2x", answer="x+x", whole=False) is True
    assert own._process is process  # The limit is the worker's own.
    own.close()


def test_a_worker_that_dies_is_started_again():
    own = Worker()
    assert own.ask(gold="2x", answer="x+x", whole=False) is True
    assert own._process is not None
    os.kill(own._process.pid, signal.SIGSTOP)
    os.kill(own._process.pid, signal.SIGKILL)
    own._process.wait()
    assert own.ask(gold="2x", answer="x+x", whole=False) is True
    own.close()
    own.close()


def test_a_limit_of_the_system_is_not_raised():
    code = (
        "import resource as r; from fireopd_jax.evaluation.symbolic_worker import limited;"
        "r.setrlimit(r.RLIMIT_AS, (2**33, 2**33)); limited(r.RLIMIT_AS, 2**34);"
        "assert r.getrlimit(r.RLIMIT_AS) == (2**33, 2**33); limited(r.RLIMIT_AS, 2**32);"
        "assert r.getrlimit(r.RLIMIT_AS)[0] == 2**32"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_that_does_not_answer_is_killed(monkeypatch):
    own = Worker()
    assert own.ask(gold="2x", answer="x+x", whole=False) is True
    assert own._process is not None
    monkeypatch.setattr(symbolic, "PATIENCE_S", 0.2)
    os.kill(own._process.pid, signal.SIGSTOP)
    assert own.ask(gold="2x", answer="x+x", whole=False) is None
    assert own._process is None


def test_an_interrupted_question_is_not_answered_later(monkeypatch):
    own = Worker()
    assert own.ask(gold="2x", answer="x+x", whole=False) is True
    with monkeypatch.context() as patched:
        patched.setattr(own, "_reply", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            own.ask(gold="2x", answer="x+x", whole=False)
    assert own.ask(gold="2x", answer="3x", whole=False) is False
    own.close()


def test_a_worker_that_cannot_start_is_an_error_and_not_a_wrong_answer(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no parser')\n")
    monkeypatch.setattr(symbolic, "HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="math-verify did not start: ImportError: no parser"):
        Worker().ask(gold="2x", answer="x+x", whole=False)


def test_threads_share_the_worker():
    answers = {}

    def ask(n):
        answers[n] = grade(rf"\boxed{{(x+{n})^2}}", f"x^2+{2 * n}x+{n * n}")

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(2, 8), True)
