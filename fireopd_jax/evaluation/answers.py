r"""Where a response states its final answer.

    response -> without thinking -> (text of the final answer, where it was found)

The first rule that applies:

1. `box`, `####`, `tag`: the last closed `\boxed{...}`, the last line of `####`, or the last
   `<answer>...</answer>`, whichever is latest. Boxes joined by "and", "or" or a comma are one list.
   A mark that is open at the end of the response was cut off: it does not count, and if it is the
   only one, there is no answer.
2. `phrase`: what follows the last "the answer is", "Answer:" and the like.
3. `last line`: the last line that is no courtesy ("Let me know ..."): its last equation, formula
   or number. Several joined by "or" are one hedged answer, the list of them.

Nothing inside a think block is read, nor anything after a block that is never closed.
"""

import re
from collections.abc import Iterator

from fireopd_jax.evaluation.numbers import UNSIGNED
from fireopd_jax.evaluation.spelling import BOLD, CHARACTERS, spelled, without_bold
from fireopd_jax.evaluation.values import parse, split

THOUGHTS = r"think|thinking|thought|thoughts|reasoning|scratchpad|seed:think"
THINK = [
    (re.compile(rf"<({THOUGHTS})>", re.I), re.compile(rf"</({THOUGHTS})>", re.I)),
    (re.compile(r"\[THINK\]"), re.compile(r"\[/THINK\]")),
    (re.compile(r"<\|begin_of_thought\|>"), re.compile(r"<\|end_of_thought\|>")),
    (re.compile(r"◁think▷"), re.compile(r"◁/think▷")),
]
BOX = re.compile(r"(?:\\|(?<![A-Za-z\\]))(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
BRACE = re.compile(
    rf"{BOX.pattern}\{{|\\(?:boxed|fbox)\s+(?P<bare>[^\s$\\,;.{{}}]+(?:\.\d+)?)|\\.|[{{}}]", re.S
)
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*")
TAG, END_TAG = re.compile(r"<answer>", re.I), re.compile(r"</answer>", re.I)
HEADING = re.compile(
    r"^\W*(?:(?:step|part|case|method|approach|solution|section|question|problem|example|option)\s*"
    r"(?:\d|[a-z]\b|:|$)|\d+[.)]\s+[A-Za-z]|[A-Za-z][A-Za-z ]*:?\s*$(?!\Z))",
    re.I,
)
JOINT = re.compile(
    r"[\s$]*(?:[,;]|,?\s*(?:and|or)|\\text\{\s*(?:and|or)\s*\}|\\quad)?[\s$]*(?:and|or)?[\s$]*"
)
IS = r"is|are|equals|would be|should be|must be|will be|comes? (?:out )?to"
PHRASE = re.compile(
    rf"(?:\b(?:answer|result|solution)s?\b[\s*_:]*"
    rf"(?:(?:\s(?:{IS})\b(?!\s+(?:not|in the|given by the|the same))|:|=)[\s*_:]*)"
    r"|答案(?:是|为|為|[:：])+|答え(?:は|[:：])"
    r"|(?:respuesta|réponse|antwort|risposta|resposta|ответ)\s*(?:(?:es|est|ist|è|é)\b|[:：—-])+)"
    r"\s*(?:therefore|thus|simply|just|exactly|approximately|about)?\s*:?",
    re.I,
)
WEAK = re.compile(r"^(?:result|solution)", re.I)
COURTESY = re.compile(
    r"^\W*(?:(?:please )?let me know|i hope|hope (?:this|that|it)|feel free|thanks?\b|thank you"
    r"|if you(?:'d| would|'re)? (?:have|need|want|like)|happy to|good luck|best regards"
    r"|is there anything|would you like|do you (?:have|want|need)|great job|have a)|^\W*$",
    re.I,
)
TOLD = re.compile(r"(?:\\text\{)?[A-Za-z ,']+ (?:is|are|equals)(?! not)\s*\}?\s*([^A-Za-z]+)")
SENTENCE = re.compile(r"(?<=[^\s.])[.?!](?=[\s*_$\"')]|$)(?<!\bp\.)(?<!\ba\.)|[。！？\n]")
ASIDE = re.compile(
    r"\s*,?\s+(?:because|since|as|which|where|so|when|given|after|per)\b.*|\s*\((?=[a-z]{3,} ).*",
    re.S,
)

SPAN = (
    r"\$\$[^$]+\$\$|(?<![\\\w])\$(?!\s*\d[\d,.]*\s+[A-Za-z]{2})[^$\n]+\$(?!\d)"
    r"|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]"
)
NUMBER = (
    rf"(?:(?<![\w)\]}}])[-+\u2212])?\\?[$€£¥₹]?(?<![\w.])(?:{UNSIGNED}"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|\.\d+)"
    r"(?:\s?(?:\\?%|percent\b)|\^\{?\\circ\}?|°)?"
)
ONE = rf"(?:{SPAN}|{NUMBER})"
UNIT = r"(?:\s+[A-Za-z]{2,12})?"
DOUBT = r"(?:possibly|maybe|perhaps|even)\s+"
OR = rf"(?:\s*,?\s*\b(?:or|and|and/or|to)\s+(?:{DOUBT})?|\s*,\s*{DOUBT})(?:[a-z]\s*=\s*)?"
NOT = re.compile(r"\b(?:not|never|isn't)\s+$")
HEDGED = re.compile(rf"{ONE}(?:{UNIT}\s*,\s*{ONE})*(?:{UNIT}{OR}{ONE})+|{ONE}")
"""One value, or several that are joined: `2, 3 or 4`, `7 apples or 8`."""


MAX_UNMARKED = 4000
"""Characters at the end of a response in which an answer without a mark is looked for."""
MIN_SENTENCE = 4
"""Words from which on a line without any number states no answer."""


def stated(response: str) -> tuple[str, str]:
    """Return the text of the final answer, not in normal spelling, and where it was found.

    Both are empty where the response states none.
    """
    text = without_thinking(response)
    marked = last_mark(text)
    if marked is not None:
        return marked
    text = text[-MAX_UNMARKED:].translate(CHARACTERS)
    return after_phrase(without_bold(text)) or on_last_line(text) or ("", "")


def without_thinking(response: str) -> str:
    """Return what a response says outside of think blocks."""
    for begin, end in THINK:
        closed = list(end.finditer(response))
        if closed:  # The prompt may have opened the block.
            response = response[closed[-1].end() :]
        if opened := begin.search(response):
            response = response[: opened.start()]
    return response


def last_mark(text: str) -> tuple[str, str] | None:
    """Return the latest closed box, `####` line or answer tag; None in a text without any mark."""
    boxes = list(closed_boxes(text))
    found = [(start, "box", inner) for start, _, inner in boxes[-1:]]
    if hashes := hash_line(text):
        found.append((hashes[0], "####", hashes[1]))
    ends = list(END_TAG.finditer(text))
    begins = list(TAG.finditer(text, 0, ends[-1].start())) if ends else []
    if begins:
        found.append((begins[-1].start(), "tag", text[begins[-1].end() : ends[-1].start()]))
    if not found:
        return ("", "") if _is_marked(text) else None
    _, where, inner = max(found)
    if where == "box":
        inner = ", ".join(joined_boxes(text, boxes))
    if where == "tag" and (deeper := last_mark(inner)):
        return deeper
    told = TOLD.fullmatch(inner.strip())  # `\text{The value is } 5`
    return told[1] if told else inner, where


def _is_marked(text: str) -> bool:
    """Return whether a text has an open box, an empty `####`, or an open answer tag."""
    box = re.search(r"\\(?:boxed|fbox)\s*\{", text)
    return bool(box) or bool(re.search(r"(?<!#)####\s*$", text)) or bool(TAG.search(text))


def closed_boxes(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Yield start, end and content of each box that is closed, the innermost of nested ones.

    An escaped brace does not count. `\boxed 5` is a box too.
    """
    if "box" not in text:
        return
    open_braces: list[re.Match[str]] = []
    innermost = -1
    for token in BRACE.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start[0] != "{" and start.start() >= innermost:
                yield start.start(), token.end(), text[start.end() : token.start()]
                innermost = start.end()
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token)
        elif token["bare"]:
            yield token.start(), token.end(), token["bare"]


def joined_boxes(text: str, boxes: list[tuple[int, int, str]]) -> list[str]:
    """Return the last box and those before it that only "and", "or" or a comma separate."""
    joined = [boxes[-1][2]]
    for (_, end, inner), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=False):
        between = text[end:start]
        if not JOINT.fullmatch(between) or "\n" in between:
            break
        joined.insert(0, inner)
    return joined if len(set(joined)) > 1 else joined[-1:]


def hash_line(text: str) -> tuple[int, str] | None:
    """Return position and content of the last `####` line that is no heading."""
    end = len(text.rstrip())
    for match in list(HASHES.finditer(text))[::-1]:
        stop = text.find("\n", match.end())
        line = without_bold(text[match.end() : stop if stop >= 0 else None]).strip()
        heads = 0 <= stop < end and (HEADING.match(line) or not re.search(r"[\d\\$]", line))
        if line and not heads:
            phrase = PHRASE.match(line) or re.match(r"(?:final\s+)?answer\s*:?", line, re.I)
            return match.start(), line[phrase.end() :] if phrase else line
    return None


def after_phrase(text: str) -> tuple[str, str] | None:
    """Return what the last "the answer is" introduces."""
    matches = list(PHRASE.finditer(text))
    strong = [match for match in matches if not WEAK.match(match[0])]
    for match in (strong or matches)[::-1]:
        rest = text[match.end() :].lstrip(" \t*_:：")
        lines = [line for line in rest.split("\n") if line.strip(" *_")]
        if lines and (found := distilled(joined_display(lines))):
            return found, "phrase"
    return None


def joined_display(lines: list[str]) -> str:
    r"""Return the first line, or all of a formula that `\[` or `$$` opens on it."""
    for left, right in (("\\[", "\\]"), ("$$", "$$")):
        if lines[0].strip() == left:
            inner = "\n".join(lines[1:]).partition(right)[0]
            return f"{left}{' '.join(inner.split())}{right}"
    return lines[0]


def on_last_line(text: str) -> tuple[str, str] | None:
    """Return the answer on the last line that has one; a line of courtesy has none."""
    text = re.sub(
        r"\\\[\s*(.*?)\s*\\\]", lambda m: f"\\[{' '.join(m[1].split())}\\]", text, flags=re.S
    )
    lines = [line.strip() for line in re.split(r"[\n;]", text)]
    lines = [line for line in lines if not COURTESY.match(line)]
    for line in lines[::-1]:
        sentences = [each.strip() for each in SENTENCE.split(line) if each and each.strip()]
        for sentence in sentences[::-1]:
            bold = [match[2] for match in BOLD.finditer(sentence) if HEDGED.search(match[2])]
            sentence = bold[-1] if bold else without_bold(sentence)
            if not COURTESY.match(sentence) and (
                HEDGED.search(sentence) or len(sentence.split()) < MIN_SENTENCE
            ):
                return distilled(sentence), "last line"
    return (without_bold(lines[-1]), "last line") if lines else None


def distilled(content: str) -> str:
    """Return the answer in the words that state it: `72` of `72, since 3 times 24 is 72`."""
    sentence = next((each for each in SENTENCE.split(content) if each and each.strip()), "")
    for text in (content, sentence, ASIDE.sub("", sentence)):
        text = re.sub(r"!+$", "", text.strip(" *_")).strip()
        if text and not parse(spelled(text)).words and not _is_sentence(text):
            return text
    last = split(sentence, re.compile(r"(?<![<>!\\])="))[-1] if "$" not in sentence else sentence
    if last != sentence and (found := HEDGED.search(last)) is not None:
        return found[0]
    found = [m for m in HEDGED.finditer(sentence) if not NOT.search(sentence[: m.start()])]
    if not found:
        return ASIDE.sub("", sentence).strip()
    leading = found[0].start() <= len(sentence) - len(sentence.lstrip(" *_$([{"))
    return (found[0] if leading else found[-1])[0]


def _is_sentence(text: str) -> bool:
    """Return whether plain words stand beside a value: `so 12`, `so $x$ is $5$`."""
    if re.match(r"[A-Za-z]{2,}\s+[$\\(]*\d", text):
        return True
    outside = re.sub(SPAN, " ", text)
    return outside != text and bool(
        re.search(r"[A-Za-z]{2,}", re.sub(r"\b(?:or|and)\b|\\text\{.*?\}", "", outside))
    )
