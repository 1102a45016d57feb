"""The code blocks of README and docs."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CONTRIBUTING.md", "launch/README.md", "docs/*.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its file, the line of its first line, language and text."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Return the blocks in these languages, by default all, in the order of files and lines."""
    return [block for block in _all() if not languages or block.language in languages]


def _all() -> Iterator[Block]:
    for path in sorted(path for pattern in FILES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text[: found.start()].count("\n") + 2
            yield Block(str(path.relative_to(ROOT)), line, found[1], found[2])


def commands(block: Block, program: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of a program in a block of bash."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split, call, redirected = True, None, False
        for word in [*lexer, ";"]:
            if set(word) <= set("|;&"):
                if call is not None:
                    yield call
                call = None
            elif call is not None and ">" in word:
                redirected = True
            elif redirected:
                redirected = False
            elif call is not None:
                call.append(word)
            elif word == program:
                call = []
