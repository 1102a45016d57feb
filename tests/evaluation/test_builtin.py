import pytest

from fireopd_jax.data.tasks import task_rows
from fireopd_jax.evaluation.builtin import final_answer, grade


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 1,000 + 450.\n#### 1,450", "1450"),
        ("#### 3\nWait.\n#### $18.00\nDone 7", "18"),
        ("so \\boxed{\\frac{1}{2}} or 9", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("#### Step 3: solve\n\\boxed{5}", "5"),
        ("The sum is 12.\nThe answer is -$1,234.50.", "-1234.5"),
        ("from 3-5 to 7-2", "2"),
        ("either 12 or 1/3", "1/3"),
        ("a;b;007", "7"),
        ("the answer is\n B. ", "B"),
        ("7+8+0=5c1;4+3+1=8c0;85", "85"),
        ("7+8+0=5c1;4+3+1=8c0;85\n", "85"),
        ("1-8-0=3b1;9-3-1=5b0;53", "53"),
        ("-0.0", "0"),
        (".50", "0.5"),
    ],
)
def test_final_answer_of_each_form(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "7+8",
        "7+8+0=5c1;",
        "7+8+0=5c1;4+3",
        "7+8+0=5c1;4+3+1=8",
        "7+8+0=5c1;4+3+1=8c0;",
        "the sum 3 + 4 = 7",
        "so \\boxed{85",
        "\\boxed{3} so \\boxed{",
        "the end ####",
    ],
)
def test_a_response_without_a_final_answer_has_none(text):
    assert final_answer(text) == ""
    assert not grade(text, "")


def test_grade_compares_values_and_not_spelling():
    assert grade("#### 1,450", "1450")
    assert grade("It is 18", "18.0")
    assert grade("\\boxed{18}", "9 + 9 makes it.\n#### 18")
    assert not grade("It is 18", "81")
    assert not grade("It is 1/3", "2/3")
    assert not grade("7", "")


@pytest.mark.parametrize("task", ["builtin:addition-2", "builtin:subtraction-1"])
def test_references_are_correct_and_truncated_ones_are_not(task):
    for row in task_rows(task)[:200]:
        reference, answer = row["reference"], row["answer"]
        assert grade(reference, answer)
        for end in range(reference.rindex(";") + 1):
            # Only an operand on its own may be mistaken for a bare answer.
            assert end == 1 or not grade(reference[:end], answer) or reference[end - 2] == ";"


@pytest.mark.parametrize(
    "text", ["{" * 9999, "\\boxed{" * 999, "9" * 9999, "#" * 99, "$,.;-", "\ud800", "1,,2", "٣"]
)
def test_no_text_makes_the_grader_raise(text):
    assert grade(text, "85") is False
    assert grade("85", text) is False
    assert isinstance(final_answer(text), str)
