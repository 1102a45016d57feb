"""The table of hostile inputs in the docs is that of the tests; FIREOPD_WRITE_DOCS=1 writes it."""

import re
from pathlib import Path

from tests.hostile import configuration, machine, models, rows
from tests.hostile.answers import WRITES, known

DOCS = Path(__file__).parents[2] / "docs" / "hostile_inputs.md"
GROUPS = {
    "configuration": ("Configurations", configuration.CASES),
    "rows": ("Rows", rows.CASES),
    "models": ("Models", models.CASES),
    "machine": ("Commands, machines, terminals", machine.CASES),
}
HEAD = """\
| input | typed | answer | exit |
| --- | --- | --- | --- |
"""


def cell(text):
    """Return a text as code of a table's cell; "" for none."""
    text = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text.replace("|", "\\|"))
    fence, text = ("``", f" {text} ") if "`" in text else ("`", text)
    return f"{fence}{text}{fence}" if text else ""


def shown(case, answers):
    status = "" if case.status is None else str(case.status)
    answer = answers[case.title] if case.status == 2 else ""
    return f"| {case.title} | {cell(case.command)} | {cell(answer)} | {status} |\n"


def test_the_table_in_the_docs_is_that_of_the_tests():
    count = sum(len(cases) for _, cases in GROUPS.values())
    parts = []
    for group, (title, cases) in GROUPS.items():
        answers = known(group)
        table = "".join(shown(case, answers) for case in cases)
        parts.append(f"\n## {title}\n\n{HEAD}{table}")
    intro, _, _ = DOCS.read_text(encoding="utf-8").partition("\n## ")
    intro = re.sub(r"\d+ inputs", f"{count} inputs", intro).rstrip("\n")
    text = f"{intro}\n{''.join(parts)}"
    if WRITES:
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text, "FIREOPD_WRITE_DOCS=1 writes it anew"


def test_titles_are_unique_in_a_group():
    for _, cases in GROUPS.values():
        titles = [case.title for case in cases]
        assert len(set(titles)) == len(titles)
