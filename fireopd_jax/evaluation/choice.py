"""Answers to multiple-choice questions: the letters that a response chooses.

response -> last mark, else last phrase of choice, else last line -> letters
"""

import re

from fireopd_jax.evaluation.answers import COURTESY, last_mark, without_thinking
from fireopd_jax.evaluation.spelling import CHARACTERS, spelled, without_bold

LETTER = r"(?:\(([A-J])\)|([A-J])(?![A-Za-z'’]))"
ONLY = re.compile(
    rf"\W*(?:option|choice|answer)?\s*:?\s*{LETTER}(?:[.):\s]+(?P<text>.*))?\W*", re.I | re.S
)
SEVERAL = re.compile(r"\W*[A-J]\)?(?:\s*(?:,|;|&|and|\s)?\s*\(?[A-J](?![A-Za-z])\)?)+\W*")
PHRASE = re.compile(
    r"(?:(?:answer|choice|option|选项|答案)\s*(?:is|are|be|:|：|=|是|为|選|选)+|(?:option|choice|choose|select|pick"
    r"|go with)(?=\s*\W*[A-J](?![A-Za-z])))[\s*_:]*(?:(?:the\s+)?(?:option|choice|letter)\s*)?",
    re.I,
)
LEADING = re.compile(rf"[\s*_$({{\[\"'\\]*(?:text(?:bf)?\{{)?\s*{LETTER}")
LAST = re.compile(r"\b(?:is|be)\b\W*([A-J])\W*$")
HEDGE = re.compile(rf"^\W*(?:or|/)\W*(?:option\s*)?{LETTER}")
MORE = re.compile(rf"^\W*(?:and|,|&)\W*{LETTER}(?=\W*(?:$|[.,;\n]|and|&))")


def letters(text: str) -> frozenset[str] | None:
    """Return the letters that a whole text is: `(B)`, `B. Paris`, `A, C`; None for another text."""
    text = re.sub(r"\\text(?:bf)?|[{}$]", " ", spelled(text)).strip()
    if SEVERAL.fullmatch(text):
        return frozenset(re.findall(r"[A-J]", text))
    match = ONLY.fullmatch(text)
    if match is None:
        return None
    letter = match[1] or match[2]
    rest = text[match.end(1 if match[1] else 2) :]
    if not letter.isupper() and (match["text"] or len(text) > 3):
        return None
    # `A train` is a text; `A. Train` and `(A) Train` are choices.
    if match["text"] and not re.match(r"\s*[.):]", rest):
        return None
    return None if HEDGE.match(rest) else frozenset(letter.upper())


def chosen(response: str) -> frozenset[str]:
    """Return the letters that a response chooses; empty if it chooses none, or hedges."""
    text = without_bold(without_thinking(response).translate(CHARACTERS))
    marked = last_mark(text)
    if marked is not None:
        return letters(marked[0]) or frozenset()
    if (whole := letters(text)) is not None:
        return whole
    for phrase in list(PHRASE.finditer(text))[::-1]:
        if (found := leading(text[phrase.end() :])) is not None:
            return found
    lines = [line for line in text.strip().split("\n") if not COURTESY.match(line)]
    return on_line(lines[-1]) if lines else frozenset()


def on_line(line: str) -> frozenset[str]:
    """Return the letters that a line is, or the one that it has in parentheses or ends with."""
    if (whole := letters(line)) is not None:
        return whole
    found = frozenset(re.findall(r"\(([A-J])\)", line)) or frozenset(LAST.findall(line))
    return found if len(found) == 1 else frozenset()


def leading(text: str) -> frozenset[str] | None:
    """Return the letters at the beginning of a text; empty for a hedge, None without a letter."""
    match = LEADING.match(text)
    if match is None:
        return None
    found, rest = {match[1] or match[2]}, text[match.end() :]
    while more := MORE.match(rest):
        found.add(more[1] or more[2])
        rest = rest[more.end() :]
    return frozenset() if HEDGE.match(rest) else frozenset(found)
