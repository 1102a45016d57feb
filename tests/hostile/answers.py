"""What every answer must be: an exit status, one line with the right words, in time and memory.

answers.json has the words; FIREOPD_WRITE_DOCS=1, with one worker, writes them anew.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.hostile.case import Case
from tests.hostile.world import MIB, Answer, answer_to, build

FILE = Path(__file__).with_name("answers.json")
WRITES = os.environ.get("FIREOPD_WRITE_DOCS") == "1"
OURS = ("Traceback (most recent call last)", "please report")
BEGINS = ("fireopd: ", "Error: ")
LONGEST = 110
"""Characters of an answer that are compared."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A user's folder with a finished run."""
    return build(tmp_path_factory.mktemp("hostile") / "world")


def known() -> dict[str, str]:
    """Return the first words of the refusals, by group and title."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}


def key_of(group: str, case: Case) -> str:
    return f"{group}: {case.title}"


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
        lines = refusals(answer, folder / "here")
        assert len(lines) == 1, told
        key = key_of(group, case)
        if WRITES:
            words = dict(sorted((known() | {key: lines[0]}).items()))
            FILE.write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
        assert lines[0] == known().get(key), told


def refusals(answer: Answer, folder: Path) -> list[str]:
    """Return the beginnings of the lines that are errors, without what differs by chance."""
    lines = [line for line in answer.text.splitlines() if line.startswith(BEGINS)]
    return [_settled(line.partition(": ")[2], folder) for line in lines]


def _settled(line: str, folder: Path) -> str:
    for place in (f"{folder}/", str(folder)):
        line = line.replace(place, "")
    line = re.sub(r"pid \d+", "pid N", re.sub(r"\b[0-9a-f]{12}\b", "...", line))
    return line if len(line) <= LONGEST else f"{line[:LONGEST].rpartition(' ')[0]} ..."
