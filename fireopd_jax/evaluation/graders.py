r"""Exact grading: the final answer of a response, compared as text in one normal form.

    response -> final_answer -> normal -> equal to the normal form of the answer?

Where the final answer stands, the first rule that applies:

1. After the last `####` (to the end of its line) or in the last `\boxed{...}`, whichever is later.
   An open brace is a response cut off: no answer.
2. Else in the last segment, which begins after the last `;` or line break. A segment with `=` is
   working and no answer. In a response of digits and `+-=cb;` alone (the built-in tasks' form) it
   must be a bare number. Else it is the segment's last number, or, without any, the segment itself.

No answer is the empty text, which is never right. These functions accept any text and never raise.
"""

import re

MARK = re.compile(r"####|\\boxed\s*\{")
SIGN = r"(?:(?<![\w)\]}])[-+])?"  # Not the minus between two terms.
WHOLE = r"(?:[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(rf"{SIGN}(?:\\?\$)?(?<![\w.])(?:{WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?")
BUILTIN_FORM = re.compile(r"[0-9+\-=cb;\s]*")
BARE_NUMBER = re.compile(r"-?[0-9]+")


def grade(text: str, answer: str) -> bool:
    """Say whether a response ends in the answer.

    The answer may be bare, or a worked solution that marks its own end with `####` or a box.
    """
    expected = marked_answer(answer)
    if expected is None:
        expected = normal(answer)
    return expected != "" and final_answer(text) == expected


def final_answer(text: str) -> str:
    """Take the final answer of a response, in its normal form; empty if there is none."""
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
    """Take what the last mark announces, None where there is no mark."""
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
    """Write an answer in one way: `$1,450.00` and `01450.` are `1450`; words lose their ends."""
    answer = answer.replace("\\$", "").replace("$", "").strip().rstrip(".").rstrip()
    answer = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer)
    number = re.fullmatch(r"([-+]?)([0-9]*)(?:\.([0-9]*))?", answer)
    if number is None or not (number[2] or number[3]):
        return answer
    # int() and float() would refuse or round long numbers.
    whole, fraction = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    size = f"{whole}.{fraction}" if fraction else whole
    return f"-{size}" if number[1] == "-" and size != "0" else size
