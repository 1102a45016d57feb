"""Lines of results that come in any order: to a file that a killed command resumes, or in order.

index, line -> .OUT.part -> OUT, in order, when all are there
index, line -> standard output, in order, as soon as the lines before it are there
"""

import fcntl
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fireopd_jax.config import UserError
from fireopd_jax.runtime.limits import parse_json


@runtime_checkable
class Write(Protocol):
    """Writes a line of the results."""

    def __call__(self, index: int, line: Mapping[str, Any]) -> None:
        """Write the line that belongs at `index`."""
        ...


def part_of(out: Path) -> Path:
    """Return the file of the lines so far."""
    return out.with_name(f".{out.name}.part")


def begun_with(out: Path) -> dict[str, Any]:
    """Return the settings with which a killed command began, {} without one."""
    part = part_of(out)
    if not part.is_file():
        return {}
    with part.open("rb") as file:
        first = file.readline()
    return _line(part, first) if first.endswith(b"\n") else {}


def _line(part: Path, text: bytes) -> dict[str, Any]:
    """Return a line of the file of lines so far; raise UserError for a damaged one."""
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{part}: damaged; delete it to begin again")
    return found


@contextmanager
def lines_to(
    out: Path | None, identity: Mapping[str, Any], count: int
) -> Iterator[tuple[set[int], Write]]:
    """Yield the indices of `count` lines that are there, and a function that writes one.

    The lines of `out` are there, in order, when the block ends; None is standard output, without
    a journal. Raises UserError for a journal of other settings, or in use.
    """
    if out is None:
        yield set(), _in_order()
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(out)
    with journal(part, json.loads(json.dumps(identity))) as (done, write):
        yield done, write
        settle(part, out, count)


def _in_order() -> Write:
    waiting: dict[int, str] = {}
    next_index = 0

    def write(index: int, line: Mapping[str, Any]) -> None:
        nonlocal next_index
        waiting[index] = json.dumps(line, default=str)
        while next_index in waiting:
            print(waiting.pop(next_index), flush=True)
            next_index += 1

    return write


@contextmanager
def journal(part: Path, identity: Mapping[str, Any]) -> Iterator[tuple[set[int], Write]]:
    """Open the file of finished responses; yield their indices, and a function that appends one.

    The first line holds the settings; a line cut off by a kill is dropped. Raises UserError for a
    file of other settings, or in use by another process.
    """
    with part.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{part}: in use by a live process; wait for it") from None
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]
        file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            file.write(json.dumps(identity).encode() + b"\n")
        elif (begun := _line(part, lines[0])) != identity:
            key = next(key for key in {**identity, **begun} if begun.get(key) != identity.get(key))
            raise UserError(
                f"{part} was begun with {key}={begun.get(key)!r}, not {identity.get(key)!r}; use "
                "the same settings, or remove that file"
            )
        done = {_line(part, line).get("index", -1) for line in lines[1:]}
        if done - set(range(len(lines) + max(done, default=0))):
            raise UserError(f"{part}: damaged; delete it to begin again")

        def write(index: int, line: Mapping[str, Any]) -> None:
            text = json.dumps({"index": index, "row": line}, default=str)
            file.write(text.encode() + b"\n")
            file.flush()

        yield done, write


def settle(part: Path, out: Path, count: int) -> None:
    """Write the lines in order to `out`, then remove the file of the lines so far."""
    lines = part.read_text(encoding="utf-8").splitlines()[1:]
    rows = {line["index"]: line["row"] for line in map(json.loads, lines)}
    assert sorted(rows) == list(range(count))
    beside = out.with_name(f".writing-{out.name}")
    try:
        beside.write_text("".join(json.dumps(rows[i]) + "\n" for i in range(count)), "utf-8")
        out.hardlink_to(beside)  # fails where a rename would overwrite a file created meanwhile
    finally:
        beside.unlink(missing_ok=True)
    part.unlink()


def say(text: str) -> None:
    """Print what the command is doing on stderr, so that standard output has results only."""
    print(f"fireopd: {text}", file=sys.stderr, flush=True)
