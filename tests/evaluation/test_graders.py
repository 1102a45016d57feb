"""Grades: pairs of one value and of different values, the other kinds, and who decided."""

import hashlib
import random
import subprocess
import sys

import pytest

import fireopd_jax
from fireopd_jax.config import UserError
from fireopd_jax.data.sources import DataConfig, read_rows
from fireopd_jax.data.tasks import task_rows
from fireopd_jax.evaluation.graders import (
    check_kind,
    final_answer,
    grade,
    kind_of,
    same_answer,
    unreadable,
    verdict,
)
from tests.evaluation.math_pairs import RIGHT
from tests.evaluation.public_answers import ANSWERS
from tests.evaluation.wrong_pairs import WRONG


def flat(pairs):
    return [pytest.param(*pair, id=f"{kind}-{i}") for kind in pairs
            for i, pair in enumerate(pairs[kind])]  # fmt: skip


@pytest.mark.parametrize(("response", "answer"), flat(RIGHT))
def test_answers_of_one_value_are_right(response, answer):
    assert grade(response, answer)


@pytest.mark.parametrize(("response", "answer"), flat(WRONG))
def test_answers_of_different_values_are_wrong(response, answer):
    assert not grade(response, answer)


@pytest.mark.parametrize("name", ANSWERS)
def test_gold_answers_of_public_sets_grade_themselves_and_other_spellings(name):
    golds = list(ANSWERS[name])
    for gold, spellings in ANSWERS[name].items():
        assert len(spellings) == 3 and unreadable(gold) is None
        for response in [gold, rf"\boxed{{{gold.rpartition('#### ')[2]}}}", *spellings]:
            assert grade(response, gold), (response, gold)
        for other in golds:
            assert grade(other, gold) == (other == gold)


@pytest.mark.parametrize(
    ("response", "answer", "rule", "plain"),
    [
        (r"so \boxed{0.5}", r"\frac{1}{2}", "box: number", True),
        ("#### 18 dollars", "18", "####: number", True),
        (r"\boxed{25\%}", "0.25", "box: percent", True),
        (r"\boxed{1\text{ m}}", r"100\text{ cm}", "box: units", False),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", "box: sympy", True),
        (r"\boxed{(1,2)}", r"\{1,2\}", "box: shape", True),
        ("The answer is (B).", "B", "phrase: choice", False),
        ("<think>The answer is 7.", "7", "no answer", True),
        ("7", "", "no gold answer", None),
        ("7", "7", "digits: text", None),
        (r"\boxed{9^{9^{9^9}}}", "7", "box: too large", None),
    ],
)
def test_the_rule_that_decides_is_kept_beside_math_verifys_own_verdict(
    response, answer, rule, plain
):
    found = verdict(response, answer)
    assert (found.rule, found.plain) == (rule, plain)
    assert found.correct == grade(response, answer)


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"\boxed{(B)}", "B", True),
        ("The answer is (B) Paris.", "B", True),
        ("I would choose option B because of C.", "B", True),
        ("**B**", "(B)", True),
        ("It is (B).", "B", True),
        ("So the right one is B.", "B", True),
        ("It is (A) or (B).", "B", False),
        ("b", "B", True),
        ("B. Paris", "B. Paris", True),
        ("Answer: B", "b)", True),
        ("答案：Ｂ", "B", True),
        ("<think>A is right</think>\nSo it must be B.\n\nB", "B", True),
        (r"\boxed{A, C}", "AC", True),
        ("The answer is A and C.", "A, C", True),
        ("The answer is A or B.", "B", False),
        ("The answer is A or B.", "A", False),
        ("The answer is C.", "B", False),
        ("A train goes from A to B", "A", False),
        (r"\boxed{A}", "A, C", False),
        (r"\boxed{\text{Paris}}", "Paris", True),
        ("", "B", False),
        ("The answer is B", "", False),
    ],
)
def test_choices_are_compared_by_letter(response, answer, correct):
    assert grade(response, answer, "choice") == correct


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("Paris", "Paris", True),
        ("The answer is Paris.", "Paris", True),
        (r"\boxed{\text{Paris}}", "Paris", True),
        ("<think>Rome</think> **Paris**", "Paris", True),
        ("one\n two", "one two", True),
        ("paris", "Paris", False),
        ("0.5", "1/2", False),
        ("Paris, I think", "Paris", False),
        ("", "", False),
    ],
)
def test_exact_answers_are_compared_as_text(response, answer, correct):
    assert grade(response, answer, "exact") == correct


def test_a_grader_of_ones_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_graders.py").write_text(
        "def last(response, answer): return response.endswith(answer)\n"
        "def odd(response, answer): return 0.5\n"
        "def broken(response, answer): return response[99]\n"
        "LIMIT = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    found = verdict("so 12", "12", "my_graders.last")
    assert (found.correct, found.rule, found.plain) == (True, "my_graders.last", None)
    assert not grade("12 it is", "12", "my_graders.last")
    for name, message in {
        "my_graders.odd": "returned 0.5; expected True or False",
        "my_graders.broken": "raised IndexError: .* on response 'so 12', answer '12'",
        "my_graders.LIMIT": "is no function, but int",
        "my_graders.absent": "cannot be imported: AttributeError",
        "my_grader.last": "cannot be imported: ModuleNotFoundError: No module named 'my_grader'",
    }.items():
        with pytest.raises(UserError, match=f"^data.grader: .*{message}") as error:
            grade("so 12", "12", name)
        assert "\n" not in str(error.value)
    assert str(tmp_path) not in sys.path


def test_an_unknown_kind_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown kind 'maths'.*did you mean 'math'"):
        check_kind("maths")
    for kind in ("math", "exact", "choice", "code", "operator.eq"):
        check_kind(kind)


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ("", "math", "is empty"),
        (r"\boxed{5", "math", "a mark without an answer"),
        (r"\frac{1}{", "math", "brackets do not match"),
        ("[1, 2)", "math", None),
        (r"\frac{1}{2}", "math", None),
        ("Paris", "choice", "is no letter"),
        ("(B)", "choice", None),
        ("Paris", "exact", None),
        ("  ", "exact", "is empty"),
    ],
)
def test_gold_answers_that_no_response_can_match_are_named(answer, kind, reason):
    found = unreadable(answer, kind)
    assert found is None if reason is None else found is not None and reason in found


def test_final_answers_are_compared_between_two_responses():
    assert same_answer("so #### 12", r"\boxed{12.0}") and not same_answer("so 12", "so 13")
    assert not same_answer("", "") and not same_answer("<think>1", "<think>1")
    assert same_answer("It is (B).", "B", "choice") and not same_answer(
        "A or B", "A or B", "choice"
    )


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The total is $1,450.00.", "1450"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        ("so 0.50 cups", "0.5"),
        (r"\boxed{-\frac{1}{80}}", "-0.0125"),
        (r"\boxed{2/6}", "1/3"),
        (r"\boxed{25\%}", "25%"),
        (r"\boxed{18\text{ cm}}", "18"),
        (r"\boxed{\dfrac{\pi}{2}}", r"\frac{\pi}{2}"),
        ("<think>7", ""),
    ],
)
def test_final_answers_are_written_alike(response, answer):
    assert final_answer(response) == answer


ALPHABET = "0123456789+-=cb;\n #$,.ax\\{}boxed"
GRADES = {"builtin:addition-2": "fe703a6928f2aba7", "builtin:subtraction-1": "f0168cbef2773710"}
"""Digest of the grades of `responses` by the grader of the first runs."""


def responses(seed, rows, count):
    """References with random edits, cut off at random."""
    rng = random.Random(seed)
    for _ in range(count):
        row = rng.choice(rows)
        text = list(row["reference"])
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(3)] = rng.choice(ALPHABET) * rng.randrange(3)
        yield "".join(text)[: rng.randrange(1, 99)], row["answer"]


@pytest.mark.parametrize("task", GRADES)
def test_grades_of_built_in_tasks_are_those_of_the_first_runs(task):
    kind = kind_of(read_rows(DataConfig(path=task))[0], "math")
    grades = [grade(*pair, kind) for pair in responses(0, task_rows(task), 5000)]
    assert 0 < sum(grades) < 5000
    assert hashlib.sha256(bytes(grades)).hexdigest()[:16] == GRADES[task]
    # Files of such rows have no name of a task: the form of the response decides.
    formed = [
        pair for pair in responses(1, task_rows(task), 500) if set(pair[0]) <= set(ALPHABET[:17])
    ]
    assert [grade(*pair) for pair in formed] == [grade(*pair, kind) for pair in formed]


def test_the_kind_of_a_row_is_the_runs_but_for_built_in_maths(tmp_path):
    row = read_rows(DataConfig(path="builtin:addition-1"))[0]
    assert kind_of(row, "math") == "built-in task" and kind_of(row, "exact") == "exact"
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    assert kind_of(read_rows(DataConfig(path=str(file)))[0], "math") == "math"
    assert verdict("0", "0", "built-in task").rule == "built-in task"


def test_grading_imports_no_sympy_into_this_process():
    code = (
        "import sys, fireopd_jax; assert fireopd_jax.grade(r'\\boxed{(x+1)^2}', 'x^2+2x+1'); "
        "assert not {'sympy', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert fireopd_jax.grade is grade


def test_tests_that_are_none_are_listed():
    assert "not tests" in str(unreadable("not tests", "code"))
    assert unreadable('{"inputs": ["1"], "outputs": ["2"]}', "code") is None
