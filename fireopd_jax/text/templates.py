"""Prompts that quote other texts: the privileged solution, or the student's own attempt.

    template, problem, {attempt, reference} -> the last user message of a conversation

Named templates are our own words for what the papers describe; any text with the fields in braces
is a template, too.
"""

import re
from collections.abc import Mapping, Sequence

import regex
from pydantic import field_validator

from fireopd_jax.config import config, nearest
from fireopd_jax.text.chat import Message

CUT = "[... truncated ...]"
"""Last words of a quotation that was cut."""
FINAL = "Give the final answer in \\boxed{}."
FENCED = "Give the program only, in one fenced block."
QUOTED_PROBLEM = "Problem:\n{problem}\n\n"
QUOTED_REFERENCE = "Reference solution:\n{reference}\n\n"
QUOTED_ATTEMPT = "Your first solution:\n{attempt}\n\n"
ITEMS = (
    "- Follow the structure and the line of reasoning of your first solution.\n"
    "- Look for wrong computations and wrong steps, and correct them.\n"
    "- Leave what is correct as it is.\n"
    "- Write the new solution and nothing else.\n"
)
ITEMS_REFERENCE = (
    "- First understand the method of the reference solution.\n"
    "- Make the new solution agree with it.\n"
    "- Keep the parts of your first solution that are useful, and its style.\n"
    "- Write the new solution and nothing else; do not speak of the reference.\n"
)
ITEMS_CODE = (
    "- Correct what is wrong, edge cases included.\n- Keep what is useful in your first solution.\n"
)
TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "teacher": {
        "reference": QUOTED_PROBLEM
        + QUOTED_REFERENCE
        + "Make sure that you understand every step of the reference solution. Then solve the "
        "problem yourself, step by step and in your own words, without copying it; you may go back "
        f"and correct yourself. {FINAL}"
    },
    "rewrite": {
        "maths": "Write your solution of this problem anew.\n\n"
        + QUOTED_PROBLEM
        + QUOTED_ATTEMPT
        + ITEMS
        + FINAL,
        "maths_reference": "Write your solution of this problem anew.\n\n"
        + QUOTED_PROBLEM
        + QUOTED_REFERENCE
        + QUOTED_ATTEMPT
        + ITEMS_REFERENCE
        + FINAL,
        "code": "Write your program for this problem anew.\n\n"
        + QUOTED_PROBLEM
        + QUOTED_ATTEMPT
        + ITEMS_CODE
        + FENCED,
        "code_reference": "Write your program for this problem anew.\n\n"
        + QUOTED_PROBLEM
        + "Reference solution:\n```\n{reference}\n```\n\n"
        + QUOTED_ATTEMPT
        + ITEMS_CODE
        + FENCED,
    },
}
"""Purpose -> name -> template."""
NAMES = ("problem", "attempt", "reference")
FIELDS = re.compile(r"\{(problem|attempt|reference)\}")


@config
class Leak:
    """Responses that speak of privileged information, found by a regular expression."""

    pattern: str = r"(?i)\b(?:reference|provided|given) (?:solution|answer)\b"
    """Regular expression that marks such a response."""
    drop: bool = False
    """Do not train on these responses; by default they are only counted."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
            regex.compile(pattern)
        except (re.error, regex.error) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern


def check_template(text: str, purpose: str, fields: Sequence[str]) -> None:
    """Raise ValueError unless `text` names a template of the purpose, or has all `fields`."""
    known = TEMPLATES[purpose]
    if text in known:
        return
    if "{" not in text:
        raise ValueError(
            f"prompt: no template {text!r}; expected {' or '.join(known)}, or a text with "
            f"{' and '.join(f'{{{field}}}' for field in fields)}{nearest(text, known)}"
        )
    for field in fields:
        if f"{{{field}}}" not in text:
            raise ValueError(f"prompt: the text lacks {{{field}}}")
    for name in re.findall(r"\{(\w+)\}", text):
        if name not in NAMES and (hint := nearest(name, NAMES)):
            raise ValueError(f"prompt: unknown field {{{name}}}{hint}")
    if purpose == "teacher" and "{attempt}" in text:
        raise ValueError("prompt: {attempt} is known to method.refine.prompt only")


def needs_reference(text: str) -> bool:
    """Return whether a template, or the one of this name, quotes the privileged solution."""
    return "{reference}" in template(text)


def template(text: str) -> str:
    """Return the template of this name, or the text itself."""
    for known in TEMPLATES.values():
        if text in known:
            return known[text]
    return text


def filled(text: str, fields: Mapping[str, str]) -> str:
    """Return a template with its fields replaced; braces in the quoted texts are left alone."""
    return FIELDS.sub(lambda match: fields[match[1]], template(text))


def asking(
    conversation: Sequence[Message], text: str, fields: Mapping[str, str]
) -> tuple[Message, ...]:
    """Return a conversation whose last user message is the template, filled.

    `{problem}` is what that message said; other messages, such as a system prompt, stay. Without a
    user's message it is the last one.
    """
    users = [i for i, turn in enumerate(conversation) if turn["role"] == "user"]
    last = users[-1] if users else len(conversation) - 1
    problem = conversation[last]["content"]
    asked = Message(role="user", content=filled(text, {**fields, "problem": problem}))
    return (*conversation[:last], asked, *conversation[last + 1 :])
