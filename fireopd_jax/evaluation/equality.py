r"""Equality of two answers, and the rule that decides it.

    gold, answer -> times, bases, ratios, numbers, structures, words, else formulas

Two formulas are compared by a function that the caller gives (`symbolic.py`).
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from fireopd_jax.evaluation.numbers import equal_numbers, number
from fireopd_jax.evaluation.spelling import MAX_LENGTH, ungrouped
from fireopd_jax.evaluation.values import Value, of_words

Symbolic = Callable[[str, str], bool | None]
"""Compares two formulas of LaTeX; None where they are too large, or took too long."""

BASE = re.compile(
    r"([0-9A-Za-z]+)_\{?(?:\\text\{)?\s*(\d+|two|three|four|five|six|seven|eight|nine|ten)\s*\}*"
)
CLOCK = re.compile(
    r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:\\text\{)?\s*([ap])?\.?\s?(?:m\.?)?\s*\}?", re.I
)
QUOTIENT = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)(?:\s*:\s*(\d+(?:\.\d+)?))?")
PUNCTUATION = re.compile(r"\\text|(?<!\d)[.,;:]|[.,;:](?!\d)|[!?'\"$\\{}]")


def equal(gold: Value, answer: Value, symbolic: Symbolic) -> tuple[bool, str]:
    """Return whether two values are equal, and by which rule."""
    if not gold.text and not gold.items:
        return False, "no gold answer"
    if gold.name and answer.name and gold.name != answer.name:
        return False, "names"
    if gold.text and same_text(gold.text, answer.text):
        return True, "text"
    for special in (_times, _bases, _ratios):
        if (found := special(gold.text, answer.text)) is not None:
            return found, special.__name__.lstrip("_")
    if gold.number and answer.number:
        return equal_numbers(gold.number, answer.number)
    if gold.shape or answer.shape:
        return _structures(gold, answer, symbolic)
    if gold.words or answer.words:
        return False, "text"
    return _formulas(gold, answer, symbolic)


def _formulas(gold: Value, answer: Value, symbolic: Symbolic) -> tuple[bool, str]:
    a, b = gold.text, answer.text
    if "=" in a + b:  # Two equations of one line, `y = 2x + 3` and `2x - y + 3 = 0`.
        a, b = gold.equation or a, answer.equation or b
    found = symbolic(a, b)
    return bool(found), "sympy" if found is not None else "too large"


def same_text(a: str, b: str) -> bool:
    """Return whether two texts are equal but for spaces, and of words also case and punctuation."""
    spaces = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
    if ungrouped(spaces.sub("", a)) == ungrouped(spaces.sub("", b)):
        return True
    if max(len(a), len(b)) > MAX_LENGTH:
        return a == b
    one, two = (" ".join(PUNCTUATION.sub(" ", text).split()).casefold() for text in (a, b))
    return one == two and of_words(a) and of_words(b)


def _structures(gold: Value, answer: Value, symbolic: Symbolic) -> tuple[bool, str]:
    if not (gold.shape and answer.shape):
        return _single(gold, answer, symbolic)
    shapes = {gold.shape, answer.shape}
    if len(shapes) > 1 and not (
        shapes in ({"list", "tuple"}, {"list", "set"}, {"list", "union"})
        or (shapes == {"list", "closed"} and len(gold.items) > 2)
    ):
        return False, "shape"
    rule = next((s for s in ("matrix", "union", "set", "tuple", "list") if s in shapes), "interval")
    if shapes & {"set", "list", "union"} and not shapes & {"tuple", "closed"}:
        return _unordered(gold.items, answer.items, symbolic, distinct="set" in shapes), rule
    if len(gold.items) != len(answer.items):
        return False, rule
    pairs = zip(gold.items, answer.items, strict=True)
    return all(equal(a, b, symbolic)[0] for a, b in pairs), rule


def _single(gold: Value, answer: Value, symbolic: Symbolic) -> tuple[bool, str]:
    """Compare a structure with a single value: `{5}` and `1/2 or 0.5` are one value."""
    many, one = (gold, answer) if gold.shape else (answer, gold)
    if many.shape in ("set", "list") and many.items:
        return all(equal(item, one, symbolic)[0] for item in many.items), "list"
    if one.number or one.words or many.shape in ("list", "set"):
        return False, "shape"
    return _formulas(gold, answer, symbolic)


def _unordered(
    gold: Sequence[Value], answer: Sequence[Value], symbolic: Symbolic, distinct: bool
) -> bool:
    """Return whether the values pair off; with `distinct` as sets, else with multiplicity."""
    rest = list(answer)
    for item in gold:
        found = [other for other in rest if equal(item, other, symbolic)[0]]
        if not found and not (distinct and any(equal(item, b, symbolic)[0] for b in answer)):
            return False
        for other in found if distinct else found[:1]:
            rest.remove(other)
    return not rest


def _times(gold: str, answer: str) -> bool | None:
    """Compare times of day, 3:30 p.m.; None for anything else."""
    a, b = CLOCK.fullmatch(gold), CLOCK.fullmatch(answer)
    if not (a and b and int(a[1]) < 25 and int(a[2]) < 60):
        return None
    halves = {half.lower() for half in (a[4], b[4]) if half}
    clock = [(int(m[1]), int(m[2]), int(m[3] or 0)) for m in (a, b)]
    return clock[0] == clock[1] and len(halves) < 2


def _bases(gold: str, answer: str) -> bool | None:
    """Compare numerals with a base, 101_2; a missing base is the other's. None without any."""
    a, b = BASE.fullmatch(gold), BASE.fullmatch(answer)
    digits = [match[1] if match else text for match, text in ((a, gold), (b, answer))]
    if not (a or b) or not all(re.fullmatch(r"[0-9A-Za-z]+", each) for each in digits):
        return None
    if not all(each[0].isdigit() for each in digits):
        return None
    bases = [_base(match or a or b) for match in (a, b)]
    try:
        return int(digits[0], bases[0]) == int(digits[1], bases[1])
    except ValueError:
        return None


def _base(match: re.Match[str] | None) -> int:
    assert match is not None
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return int(match[2]) if match[2].isdigit() else names.index(match[2])


def _ratios(gold: str, answer: str) -> bool | None:
    """Compare ratios, 3:4 and 6 : 8 and 3/4; None without any."""
    a, b = (
        QUOTIENT.fullmatch(text.replace(r"\text{ to }", ":").replace(" to ", ":"))
        for text in (gold, answer)
    )
    if a and b:
        one, two = ([Fraction(each) for each in m.groups() if each] for m in (a, b))
        return (
            len(one) == len(two)
            and all(x * two[0] == y * one[0] for x, y in zip(one, two, strict=True))
            and bool(one[0])
        )
    ratio, other = (a, number(answer)) if a else (b, number(gold))
    if ratio is None or ratio[3] or other is None or not Fraction(ratio[2]):
        return None
    return Fraction(ratio[1]) / Fraction(ratio[2]) == other.size
