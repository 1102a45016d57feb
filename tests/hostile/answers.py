"""What every answer must be: an exit status, one line with the right words, in time and memory.

answers/GROUP.json has the words; FIREOPD_WRITE_DOCS=1 writes them anew.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.hostile.case import Case
from tests.hostile.world import MIB, Answer, answer_to, build

FOLDER = Path(__file__).with_name("answers")
WRITES = os.environ.get("FIREOPD_WRITE_DOCS") == "1"
OURS = ("Traceback (most recent call last)", "please report")
BEGINS = ("fireopd: ", "Error: ")
LONGEST = 110
"""Characters of an answer that are compared."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A user's folder with a finished run."""
    return build(tmp_path_factory.mktemp("hostile") / "world")


def known(group: str) -> dict[str, str]:
    """Return the first words of the refusals, by title."""
    file = FOLDER / f"{group}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check(group: str, case: Case, world: Path, folder: Path) -> None:
    """Assert that a case is answered as it must be."""
    answer = answer_to(case, world, folder / "here")
    told = f"{case.command}\nexit {answer.status}, {answer.seconds:.0f} s, {answer.text[-2000:]}"
    assert answer.status not in (124, 137, -9), f"it hangs: {told}"
    assert case.status in (None, answer.status), told
    assert case.says in answer.text, f"it does not say {case.says!r}: {told}"
    assert not any(each in answer.text for each in OURS), told
    assert answer.mib < MIB, told
    if case.status == 2:
        refused = refusal(answer, folder / "here")
        if WRITES:
            words = dict(sorted((known(group) | {case.title: refused}).items()))
            text = json.dumps(words, indent=1, ensure_ascii=False) + "\n"
            (FOLDER / f"{group}.json").write_text(text, encoding="utf-8")
        assert refused == known(group).get(case.title), told


def refusal(answer: Answer, folder: Path) -> str:
    """Return the beginning of the error, the last line of its form, without what differs by chance.

    The lines before it say what the command has begun to do, those after it list its parts.
    """
    lines = [line for line in answer.text.splitlines() if line.startswith(BEGINS)]
    assert lines, answer.text[-2000:]
    line = lines[-1]
    return _settled(line.partition(": ")[2], folder)


def _settled(line: str, folder: Path) -> str:
    for place in (f"{folder}/", str(folder)):
        line = line.replace(place, "")
    line = re.sub(r"pid \d+", "pid N", re.sub(r"\b[0-9a-f]{12}\b", "...", line))
    line = re.sub(r"[\w.-]+\.so\b[.\d]*", "LIBRARY", line)  # the first that finds no room
    return line if len(line) <= LONGEST else f"{line[:LONGEST].rpartition(' ')[0]} ..."
