r"""Answers as values: numbers, lists, tuples, sets, intervals, words, formulas.

    text -> normal spelling -> Value

A text without any known structure is a formula, or words.
"""

import dataclasses
import re

from fireopd_jax.evaluation.numbers import Number, is_unit, number
from fireopd_jax.evaluation.spelling import GROUPED, MAX_LENGTH, ungrouped

MAX_ITEMS = 40
"""Longer lists are compared as text."""

MAX_NESTED = 8
"""Structures in structures."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An answer in normal spelling, and what it was found to be."""

    text: str
    number: Number | None = None
    name: str | None = None
    """The variable of an equation `x = 5`, of which the value is the right side."""
    shape: str | None = None
    """`list` (1, 2), `tuple` (1, 2) in parentheses, `closed` [1, 2], `set`, `union`, `matrix`, or
    the two brackets of a half-open interval."""
    items: tuple["Value", ...] = ()
    words: bool = False
    """Whether the text is of words, which no algebra applies to."""
    equation: str = ""
    """The whole equation of which the value is the right side."""


OPEN, CLOSE = "([{", ")]}"
NAME = re.compile(
    r"(?:\\[A-Za-z]+|[A-Za-z]{1,3})(?:_\{?\w+\}?)?(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?'*"
)
BUILDER = re.compile(r"\\\{\s*\w+\s*(?:\||\\mid(?![A-Za-z])|:)\s*(.*)\\\}", re.S)
MEMBER = re.compile(r"^\(?(?:\\?[A-Za-z]+|\([A-Za-z, ]+\))\)?\s*\\in(?![A-Za-z])\s*")
RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<=|>=|<|>")
MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.S)
MEASURED = re.compile(r"(.*(?:[\d})]|\\[a-z]+))(\s*\\text\{.*|\s+[A-Za-z].*)")
COMMAND = re.compile(r"\\(?!text)[A-Za-z]+|\\text\{\s*([A-Za-z]?)\s*\}")
WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z][A-Za-z'’-]{3,}(?![A-Za-z(^_])")
WORDS = re.compile(
    r"(?=.*[A-Za-z]{3})[A-Za-z\s.,'’-]+|.*(?<![A-Za-z\\])[A-Za-z]{2,}\s+[A-Za-z]{2,}.*"
)
CONJUNCTION = re.compile(
    r"\s*,?\s*(?:(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\text\{\s*(?:and|or)\s*\}|\\(?:lor|vee)(?![A-Za-z]))\s*"
)


def parse(text: str, depth: int = 0) -> Value:
    """Return the value of a text in normal spelling."""
    text = text.strip()
    if depth > MAX_NESTED or len(text) > MAX_LENGTH:
        return Value(text, words=True)
    text = unwrapped(text)
    if found := number(text):
        return Value(text, found)
    if matrix := MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        cells = [[parse(cell, depth + 1) for cell in row.split("&")] for row in rows]
        return Value(
            text,
            shape="matrix",
            items=tuple(Value("", shape="tuple", items=tuple(row)) for row in cells),
        )
    text = unwrapped(MEMBER.sub("", BUILDER.sub(r"\1", text)))
    return (
        _listed(text, depth)
        or _bracketed(text, depth)
        or _equation(text, depth)
        or _inequality(text, depth)
        or _signs(text, depth)
        or _measured(text, depth)
        or Value(text, words=of_words(text))
    )


def unwrapped(text: str) -> str:
    r"""Return a text without braces or `\text` around the whole of it."""
    while True:
        inner = re.fullmatch(r"(?:\\text)?\s*\{(.*)\}", text, re.S)
        if inner is None or not balanced(inner[1]):
            return text
        text = inner[1].strip()


def balanced(text: str) -> bool:
    """Return whether no bracket of the text is closed before it is opened."""
    depth = 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        if depth < 0:
            return False
    return depth == 0


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the parts of a text between separators outside of all brackets."""
    parts, depth, start, end = [], 0, 0, 0
    while end < len(text):
        depth += (text[end] in OPEN) - (text[end] in CLOSE)
        found = separator.match(text, end) if depth == 0 else None
        if found and found.end() > end:
            parts.append(text[start:end])
            start = end = found.end()
        else:
            end += 1
    return [part.strip() for part in [*parts, text[start:]]]


LIST_SEPARATORS = [re.compile(r"\s*\\cup(?![A-Za-z])\s*"), re.compile(r"\s*;\s*"), CONJUNCTION,
                   re.compile(r"\s*(?<!\d),\s*|\s*,(?!\d{3}(?!\d))\s*")]  # fmt: skip


def _listed(text: str, depth: int) -> Value | None:
    r"""Return a list without brackets: `1, 2 and 3`, a union `(1, 2) \cup (3, 4)`."""
    for separator in LIST_SEPARATORS:
        parts = [part for part in split(text, separator) if part]
        if not 1 < len(parts) <= MAX_ITEMS:
            continue
        items = [parse(part, depth + 1) for part in parts]
        if separator is CONJUNCTION:  # `1, 2 and 3` is one list.
            items = [each for item in items
                     for each in (item.items if item.shape == "list" else (item,))]  # fmt: skip
        if any(item.words for item in items) and separator is not LIST_SEPARATORS[1]:
            return (
                Value(text, words=True)
                if any(_long(item) for item in items)
                else Value(text, shape="list", items=tuple(items))
            )
        union = separator is LIST_SEPARATORS[0] or all(map(_is_interval, items))
        return Value(text, shape="union" if union else "list", items=tuple(items))
    return None


def _long(item: Value) -> bool:
    return item.words and len(item.text.split()) > 3


def _is_interval(item: Value) -> bool:
    return item.shape in ("closed", "(]", "[)") or (
        item.shape == "tuple" and any("infty" in end.text for end in item.items)
    )


def _bracketed(text: str, depth: int) -> Value | None:
    r"""Return a tuple, an interval or a set in brackets."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _items(text, text[2:-2], "set", depth)
    ends = text[:1] + text[-1:]
    shape = {"()": "tuple", "[]": "closed", "(]": "(]", "[)": "[)"}.get(ends)
    if shape is None or not balanced(text[1:-1]):
        return None
    if len(split(text[1:-1], re.compile(","))) < 2:
        return parse(text[1:-1], depth + 1) if shape == "tuple" else None
    return _items(text, text[1:-1], shape, depth)


def _items(text: str, inner: str, shape: str, depth: int) -> Value:
    if re.search(r",\s", GROUPED.sub("", inner)):  # `(1,000, 2,000)`
        inner = ungrouped(inner)
    parts = split(inner, re.compile(r"\s*[,;]\s*")) if inner.strip() else []
    if len(parts) > MAX_ITEMS:
        return Value(text, words=True)
    items = tuple(parse(part, depth + 1) for part in parts)
    return Value(text, shape=shape, items=items)


def _equation(text: str, depth: int) -> Value | None:
    r"""Return the value of the last side of `x = 2 + 3 = 5`, with the variable's name."""
    sides = split(text, re.compile(r"\s*(?:(?<![<>!\\:])=(?!=)|\\equiv(?![A-Za-z])|:=)\s*"))
    if len(sides) < 2 or not sides[-1]:
        sides = split(text, re.compile(r"\s*(?:\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])|~)\s*"))
        if len(sides) < 2 or not sides[-1]:
            return None
        exact = parse(
            sides[-2] if sides[-2] and not NAME.fullmatch(sides[-2]) else sides[-1], depth + 1
        )
        return exact
    if NAME.fullmatch(sides[-1]) and number(sides[0]):  # `5 = x`
        sides = sides[::-1]
    right = parse(sides[-1], depth + 1)
    name = re.sub(r"\s|\\text", "", sides[0])
    computed = not re.search("[A-Za-z]", COMMAND.sub("", sides[0]))  # `2 + 3 = 5`
    if NAME.fullmatch(name) or computed or len(sides) > 2:
        return dataclasses.replace(
            right, name=name if NAME.fullmatch(name) else None, equation=text
        )
    if right.words or of_words(sides[0]):
        return right
    return None


def _inequality(text: str, depth: int) -> Value | None:
    r"""Return the interval of `1 < x \le 2` or `x > 3`."""
    signs = [sign.replace("\\le", "<=").replace("\\ge", ">=") for sign in RELATION.findall(text)]
    sides = [side.strip() for side in RELATION.split(text)]
    if not 2 <= len(sides) <= 3 or len({sign[0] for sign in signs}) != 1:
        return None
    if signs[0][0] == ">":
        sides, signs = sides[::-1], signs[::-1]
    closed = ["=" in sign for sign in signs]
    if len(sides) == 2:
        if NAME.fullmatch(sides[0]):
            low, high, left, right = "-\\infty", sides[1], "(", "])"[not closed[0]]
        elif NAME.fullmatch(sides[1]):
            low, high, left, right = sides[0], "\\infty", "[("[not closed[0]], ")"
        else:
            return None
    elif NAME.fullmatch(sides[1]):
        low, high, left, right = sides[0], sides[2], "[("[not closed[0]], "])"[not closed[1]]
    else:
        return None
    shape = {"()": "tuple", "[]": "closed"}.get(left + right, left + right)
    return Value(text, shape=shape, items=(parse(low, depth + 1), parse(high, depth + 1)))


def _signs(text: str, depth: int) -> Value | None:
    r"""Return both values of `1 \pm \sqrt{2}`."""
    if len(re.findall(r"\\pm(?![A-Za-z])", text)) != 1:
        return None
    both = [re.sub(r"\\pm(?![A-Za-z])\s*", sign, text) for sign in ("+", "-")]
    both[0] = both[0].removeprefix("+")
    return Value(text, shape="list", items=tuple(parse(each, depth + 1) for each in both))


def _measured(text: str, depth: int) -> Value | None:
    r"""Return the value of a formula with a unit, `12\pi\text{ cm}^2`, without the unit."""
    match = MEASURED.fullmatch(text)
    if match is None or re.search(r"(?<![A-Za-z])[A-Za-z]{2,}|:", COMMAND.sub(" ", match[1])):
        return None
    aside = re.fullmatch(r"\s*\\text\{\s*\([^{}]*\)\s*\}", match[2])  # `5\text{ (five)}`
    return parse(match[1], depth + 1) if aside or is_unit(match[2]) else None


def of_words(text: str) -> bool:
    """Return whether a text has words beside its LaTeX."""
    text = COMMAND.sub(r" \1 ", text)
    return bool(WORD.search(text) or WORDS.fullmatch(text))
