"""Built-in tasks: arithmetic on numbers of D digits, graded exactly, without any download.

    builtin:addition-2   47+38   ->   7+8+0=5c1;4+3+1=8c0;85
    builtin:subtraction-2   91-38   ->   1-8-0=3b1;9-3-1=5b0;53

The reference response works from the lowest digit up and writes down each carry `c` or borrow `b`,
so that a small model can learn it. All prompts of a task have the same length.
"""

import random
import re

from fireopd_jax.config import UserError, nearest

ROWS_MAX = 20_000
SEED = 0
OPERATIONS = {"addition": "+", "subtraction": "-"}


def task_rows(name: str) -> list[dict[str, str]]:
    """Return all rows of a built-in task, always in the same order; raise if it is unknown."""
    match = re.fullmatch(rf"builtin:({'|'.join(OPERATIONS)})-([1-9])", name)
    if match is None:
        raise UserError(
            f"data.path: no built-in task {name!r}; known are builtin:addition-D and "
            f"builtin:subtraction-D for D = 1 to 9 digits{nearest(name, task_names())}"
        )
    domain, digits = match[1], int(match[2])
    return [arithmetic_row(domain, a, b, digits) for a, b in operand_pairs(domain, digits)]


def task_names() -> list[str]:
    """Return the names of the built-in tasks."""
    return [f"builtin:{domain}-{digits}" for domain in OPERATIONS for digits in range(1, 10)]


def operand_pairs(domain: str, digits: int) -> list[tuple[int, int]]:
    """Return distinct operand pairs: all of them, shuffled, or `ROWS_MAX` drawn at random."""
    # Python guarantees the sequence of random() across versions, but not that of shuffle().
    generator = random.Random(SEED)
    size = 10**digits
    ordered = domain == "subtraction"
    if (size * (size + 1) // 2 if ordered else size * size) <= ROWS_MAX:
        pairs = [(a, b) for a in range(size) for b in range(a + 1 if ordered else size)]
        return sorted(pairs, key=lambda _: generator.random())
    drawn: dict[tuple[int, int], None] = {}
    while len(drawn) < ROWS_MAX:
        a, b = int(generator.random() * size), int(generator.random() * size)
        drawn[(max(a, b), min(a, b)) if ordered else (a, b)] = None
    return list(drawn)


def arithmetic_row(domain: str, a: int, b: int, digits: int) -> dict[str, str]:
    """Return one row: prompt, answer, worked reference response, and a hint with the answer."""
    sign = OPERATIONS[domain]
    left, right = f"{a:0{digits}d}", f"{b:0{digits}d}"
    carry, segments = 0, []
    for x, y in zip(map(int, reversed(left)), map(int, reversed(right)), strict=True):
        if domain == "addition":
            segment = f"{x}{sign}{y}{sign}{carry}={(x + y + carry) % 10}c"
            carry = (x + y + carry) // 10
        else:
            segment = f"{x}{sign}{y}{sign}{carry}={(x - y - carry) % 10}b"
            carry = int(x - y - carry < 0)
        segments.append(f"{segment}{carry}")
    answer = str(a + b if domain == "addition" else a - b)
    return {
        "prompt": f"{left}{sign}{right}",
        "answer": answer,
        "reference": ";".join([*segments, answer]),
        "privileged": f"The answer is {answer}.",
        "domain": domain,
    }
