"""The columns of the public sets of mathematical problems, as they are published."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.data.sources import DataConfig
from fireopd_jax.evaluation.evaluator import EvalResult, evaluate
from fireopd_jax.evaluation.responses import Grader, Response
from fireopd_jax.evaluation.sets import read_set

LAYOUTS = {
    "gsm8k": (
        [
            {"question": "A box has 3 pens. How many do 4 boxes have?",
             "answer": "4 boxes have 4*3 = <<4*3=12>>12 pens.\n#### 12"},
            {"question": "Of 2,000 seats 500 are taken. How many are free?",
             "answer": "2000 - 500 = <<2000-500=1500>>1500\n#### 1,500"},
        ],
        ["12", "1500"],
    ),
    "math500": (
        [
            {"problem": "What is $1/2 + 1/4$?", "solution": "Thus $\\boxed{\\frac{3}{4}}$.",
             "answer": "\\frac{3}{4}", "subject": "Algebra", "level": 1, "unique_id": "1.json"},
            {"problem": "Solve $2x = 8$.", "solution": "So $x = \\boxed{4}$.", "answer": "4",
             "subject": "Algebra", "level": 2, "unique_id": "a/2.json"},
        ],
        ["\\frac{3}{4}", "4"],
    ),
    "math": (
        [
            {"problem": "What is $5!$?", "level": "Level 1", "type": "Counting",
             "solution": "It is $5 \\cdot 24 = \\boxed{120}$."},
            {"problem": "Factor $x^2 - 1$.", "level": "Level 2", "type": "Algebra",
             "solution": "It is $\\boxed{(x-1)(x+1)}$."},
        ],
        ["120", "(x-1)(x+1)"],
    ),
    "aime24": (
        [
            {"id": 60, "problem": "How many primes are below 40?", "solution": "Count them.",
             "answer": "012", "url": "https://example.org/60", "year": "2024"},
            {"id": 61, "problem": "Find the remainder of $2^{10}$ by $1000$.",
             "solution": "It is 24.", "answer": "024", "url": "https://example.org/61",
             "year": "2024"},
        ],
        ["12", "24"],
    ),
    "aime25": (
        [{"problem_idx": 1, "problem": "Find $7 \\cdot 11$.", "answer": 77},
         {"problem_idx": 2, "problem": "Find $20^2$.", "answer": 400}],
        ["77", "400"],
    ),
    "amc23": (
        [{"id": 0, "question": "How many minutes are half an hour?", "answer": 30.0, "url": "u"},
         {"id": 1, "question": "What is a quarter of 50?", "answer": 12.5, "url": "v"}],
        ["30", "12.5"],
    ),
    "minerva": (
        [
            {"problem": "A mass of 2 kg has what weight in newtons, for $g = 10$?",
             "solution": "$mg = \\boxed{20}$ N.", "type": "Mechanics", "idx": 0},
            {"problem": "How many zeros has $10^3$?", "solution": "There are \\boxed{3}.",
             "type": "Numbers", "idx": 1},
        ],
        ["20", "3"],
    ),
    "olympiad_bench": (
        [
            {"id": 1606, "question": "Find the sum of the first 4 odd numbers.",
             "solution": ["It is a square."], "final_answer": ["16"], "context": None,
             "unit": None, "is_multiple_answer": False, "answer_type": "Numerical",
             "language": "English"},
            {"id": 1607, "question": "Find $2^7$.", "solution": ["Double it."],
             "final_answer": ["128"], "context": None, "unit": None,
             "is_multiple_answer": False, "answer_type": "Numerical", "language": "English"},
        ],
        ["16", "128"],
    ),
}  # fmt: skip


def write(folder, name, rows):
    """Write the rows in a kind of file that such sets are published in."""
    if name == "amc23":
        file = folder / f"{name}.csv"
        with file.open("w", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif name in ("math500", "aime25", "olympiad_bench"):
        file = folder / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_layout_is_read_unchanged_and_its_answers_are_right(name, tmp_path):
    rows, answers = LAYOUTS[name]
    own = read_set(name, DataConfig(path=str(write(tmp_path, name, rows))))
    asked = [row.get("problem", row.get("question")) for row in rows]
    assert [row.prompt[-1]["content"] for row in own.rows] == asked
    said = [f"The final answer is \\boxed{{{answer}}}." for answer in answers]
    for texts, score in ((said, 1.0), (said[::-1], 0.0)):
        responses = [Response(i, 0, text, 1, True) for i, text in enumerate(texts)]
        graded = evaluate(responses, own.problems, grader=Grader.of("math"), name=name)
        assert EvalResult.of(graded, 1).mean == score
