r"""Exact grading: the final answer of a response, compared as text in a normal form.

    response -> final_answer -> normal -> equal to the normal form of the answer?

The final answer is found by the first rule that applies:

1. The text after the last `####` (to the end of its line) or in the last `\boxed{...}`, whichever
   is later. An unclosed brace means that the response was cut off: no answer.
2. Else the last segment, which begins after the last `;` or line break. A segment with `=` is
   intermediate work, not an answer. In a response of digits and `+-=cb;` alone (the form of the
   built-in tasks) the segment must be a bare number. Otherwise the answer is the segment's last
   number, or, without any number, the whole segment.

A missing answer is the empty text, which is never correct. These functions accept any text and
never raise.
"""

import re

MARK = re.compile(r"####|\\boxed\s*\{")
SIGN = r"(?:(?<![\w)\]}])[-+])?"  # Not a minus between two terms.
WHOLE = r"(?:[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(rf"{SIGN}(?:\\?\$)?(?<![\w.])(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?")
BUILTIN_FORM = re.compile(r"[0-9+\-=cb;\s]*")
BARE_NUMBER = re.compile(r"-?[0-9]+")


def grade(text: str, answer: str) -> bool:
    """Return whether the final answer of a response equals the answer.

    `answer` may be bare, or a worked solution that marks its final answer with `####` or a box.
    """
    expected = marked_answer(answer)
    if expected is None:
        expected = normal(answer)
    return expected != "" and final_answer(text) == expected


def final_answer(text: str) -> str:
    """Return the final answer of a response in normal form; empty if there is none."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    segment = re.split(r"[;\n]", text.strip())[-1].strip()
    if "=" in segment:
        return ""
    if BUILTIN_FORM.fullmatch(text):
        return normal(segment) if BARE_NUMBER.fullmatch(segment) else ""
    numbers = NUMBER.findall(segment)
    return normal(numbers[-1] if numbers else segment)


def marked_answer(text: str) -> str | None:
    """Return the answer at the last `####` or box in normal form; None without such a mark."""
    marks = list(MARK.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :]
    if marks[-1][0] == "####":
        return normal(rest.strip().split("\n")[0])
    depth = 1
    for index, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return normal(rest[:index])
    return ""


def normal(answer: str) -> str:
    """Return an answer in normal form: `$1,450.00` and `01450.` become `1450`.

    Text that is not a number only loses `$`, outer spaces, final periods and thousands commas.
    """
    answer = answer.replace("\\$", "").replace("$", "").strip().rstrip(".").rstrip()
    answer = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer)
    number = re.fullmatch(r"([-+]?)([0-9]*)(?:\.([0-9]*))?", answer)
    if number is None or not (number[2] or number[3]):
        return answer
    # int() and float() would refuse or round long numbers.
    whole, fraction = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    size = f"{whole}.{fraction}" if fraction else whole
    return f"-{size}" if number[1] == "-" and size != "0" else size
