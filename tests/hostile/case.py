"""A hostile input: what a user has on the disk, what they type, and what they must be told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        title: What is wrong, in a few words; unique.
        command: What is typed, to bash, in a folder with a chat model DIR, prompts.jsonl,
            small.yaml (a tiny run of both) and runs/done, a finished run of small.yaml.
        says: What the answer must hold, beside a proper exit status.
        files: Contents of files to write before.
        prepare: Called with the folder after that.
        status: Exit status; None: any of a command that nobody listens to.
    """

    title: str
    command: str
    says: str = ""
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None
    status: int | None = 2


def typed(title: str, arguments: str, says: str = "", status: int = 2) -> Case:
    """Return a case of `fireopd train small.yaml ...`."""
    return Case(title, f"fireopd train small.yaml {arguments}", says, status=status)


def configured(title: str, content: str | bytes, says: str = "", status: int = 2) -> Case:
    """Return a case of a configuration file."""
    return Case(title, "fireopd train mine.yaml", says, {"mine.yaml": content}, status=status)


def read(
    title: str, content: str | bytes, says: str = "", status: int = 2, name: str = "bad.jsonl"
) -> Case:
    """Return a case of rows that a run is given."""
    command = f"fireopd train small.yaml --dry-run data.path={name}"
    return Case(title, command, says, {name: content}, status=status)


def loaded(title: str, prepare: Callable[[Path], object], says: str = "", status: int = 2) -> Case:
    """Return a case of a model's folder; `prepare` damages it."""
    command = "fireopd train small.yaml run.steps=1"
    return Case(title, command, says, prepare=lambda here: prepare(here / "DIR"), status=status)
