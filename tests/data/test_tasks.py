import os
import subprocess
import sys

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data.tasks import task_names, task_rows


def by_prompt(name):
    return {row["prompt"]: row for row in task_rows(name)}


def test_the_worked_examples():
    row = by_prompt("builtin:addition-2")["47+38"]
    assert row == {
        "prompt": "47+38",
        "answer": "85",
        "reference": "7+8+0=5c1;4+3+1=8c0;85",
        "privileged": "The answer is 85.",
        "domain": "addition",
    }
    row = by_prompt("builtin:subtraction-2")["91-38"]
    assert (row["reference"], row["answer"]) == ("1-8-0=3b1;9-3-1=5b0;53", "53")
    assert row["domain"] == "subtraction"


@pytest.mark.parametrize("name", task_names())
def test_every_row_is_arithmetically_correct(name):
    rows = task_rows(name)
    digits = int(name[-1])
    sign = "+" if "addition" in name else "-"
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        left, right = row["prompt"].split(sign)
        assert len(left) == len(right) == digits
        a, b = int(left), int(right)
        value = a + b if sign == "+" else a - b
        assert value >= 0
        *segments, last = row["reference"].split(";")
        assert last == row["answer"] == str(value)
        assert len(segments) == digits
        carry, number = 0, 0
        for place, segment in enumerate(segments):
            working, result = segment.split("=")
            x, y, given = map(int, working.split(sign))
            digit, carry_out = map(int, result.split("c" if sign == "+" else "b"))
            assert (x, y) == (a // 10**place % 10, b // 10**place % 10)
            assert given == carry
            signed = digit + 10 * carry_out if sign == "+" else digit - 10 * carry_out
            assert signed == (x + y + given if sign == "+" else x - y - given)
            number += digit * 10**place
            carry = carry_out
        assert number + carry * 10**digits == value


def test_small_tasks_are_complete_and_large_ones_are_sampled():
    sizes = [len(task_rows(f"builtin:addition-{digits}")) for digits in (1, 2, 3, 9)]
    assert sizes == [100, 10_000, 20_000, 20_000]
    sizes = [len(task_rows(f"builtin:subtraction-{digits}")) for digits in (1, 2, 3)]
    assert sizes == [55, 5050, 20_000]


def test_the_order_is_shuffled_and_does_not_depend_on_the_hash_seed():
    prompts = [row["prompt"] for row in task_rows("builtin:addition-3")]
    assert prompts != sorted(prompts)
    code = (
        "from fireopd_jax.data.tasks import task_rows\n"
        "print(*[row['prompt'] for row in task_rows('builtin:addition-3')][:9])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == prompts[:9]


@pytest.mark.parametrize("name", ["builtin:adition-2", "builtin:addition-0", "builtin:addition-12"])
def test_an_unknown_task_is_named(name):
    with pytest.raises(UserError, match=r"known are .*did you mean 'builtin:addition-"):
        task_rows(name)
