"""What a resumed run must find as it was: files of frozen models, chat templates and their clock.

path -> resolved folder, revision, SHA-256 of each file -> models/sources.json
tokenizers -> the chat template of each model, and the start of the run -> models/templates.json
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.models.hf_load import resolve
from fireopd_jax.runtime.files import recorded, write_atomically
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat_templates import key_of

BLOCK = 1 << 22
SOURCES = "models/sources.json"
TEMPLATES = "models/templates.json"
SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
START = "student start"
"""Name of the record of a student that the run does not train before distillation."""
DIGEST = 64
"""Number of hexadecimal digits of a SHA-256."""


def identity(spec: ModelSpec) -> dict[str, Any]:
    """Return path, folder, revision and the SHA-256 of every file of a frozen model.

    Weights in the hub's cache are links to blobs named by their SHA-256; they are not hashed again.
    """
    assert spec.config.path is not None
    folder = resolve(spec.config.path).absolute()
    files = sorted(_files(folder))
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256, files))
    revision = folder.name if folder.parent.name == "snapshots" else None
    names = (str(path.relative_to(folder)) for path in files)
    return {
        "path": spec.config.path,
        "folder": str(folder),
        "revision": revision,
        "sha256": dict(zip(names, hashes, strict=True)),
    }


def check_sources(file: Path, specs: Sequence[ModelSpec]) -> None:
    """Write the identities of models to `file`, or compare them with those it already holds.

    Raises UserError, naming the model and the changed file.
    """
    names = [START if spec.name == "student" else spec.name for spec in specs]
    now = {name: identity(spec) for name, spec in zip(names, specs, strict=True)}
    before = recorded_sources(file)
    # Earlier versions copied the student's start instead of recording it.
    if not file.is_file() or (START in now and START not in before):
        before = now | before
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(before, indent=2) + "\n")
    for name, found in now.items():
        changed = _difference(before.get(name), found)
        if changed is not None:
            raise UserError(
                f"{name}: {changed} of {found['folder']} has changed since the run began; expected "
                "the same files, or another run.dir"
            )
    if any(before[name] != found for name, found in now.items()):  # moved: the same files
        write_atomically(file, json.dumps(before | now, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Written:
    """How a run writes prompts."""

    moment: str | None = None
    """Start of the run, which the clocks of chat templates show; None in runs without a record."""
    templates: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Chat template by model: a text, or several by name."""

    @classmethod
    def of(cls, setup: Setup, moment: str) -> "Written":
        """Return the record of a run's models."""
        resident = (setup.student, *setup.teachers, *([setup.base] if setup.base else []))
        own = {spec.name: spec.tokenizer for spec in resident}
        served = {f"teacher {each.name}": each.tokenizer for each in setup.served}
        return cls(moment, {name: t.chat_template for name, t in (own | served).items()})


def check_templates(file: Path, now: Written) -> None:
    """Write how prompts are written to `file`, or compare it with the record there.

    Raises UserError, naming the model whose chat template has changed.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(dataclasses.asdict(now), indent=2) + "\n")
        return
    before = recorded_templates(file).templates
    for name, template in now.templates.items():
        if before.get(name) != template:
            raise UserError(
                f"{name}: its chat template has changed since the run began ({key_of(name)}, or "
                "the tokenizer's own); expected the same template, or another run.dir"
            )


def recorded_templates(file: Path) -> Written:
    """Return the record in `file`, an empty one without the file."""
    if not file.is_file():
        return Written()
    found = recorded(file)
    return Written(found.get("moment"), found.get("templates") or {})


def recorded_sources(file: Path) -> dict[str, Any]:
    """Return the identities recorded in `file`, by model name; {} without the file."""
    found = recorded(file) if file.is_file() else {}
    for name, source in found.items():
        kinds = {"folder": str, "sha256": dict}
        whole = isinstance(source, dict) and "revision" in source
        if not whole or not all(isinstance(source.get(k), kind) for k, kind in kinds.items()):
            raise UserError(f"{file}: damaged ({name}); delete it, a resumed run writes it again")
    return found


def _difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Return the name of the first difference: model, revision or a file; None if equal."""
    if before is None:
        return "the model"
    if before["revision"] != now["revision"]:
        return f"revision {now['revision']} (it was {before['revision']})"
    old, new = before["sha256"], now["sha256"]
    return next((n for n in sorted(old.keys() | new.keys()) if old.get(n) != new.get(n)), None)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files that a model is loaded from: weights, configuration, tokenizer, template."""
    if (folder / "model.json").is_file():  # saved by a run
        yield folder / "model.json"
        for part in ("params", "tokenizer"):
            yield from (path for path in (folder / part).rglob("*") if path.is_file())
    else:
        entries = (path for path in folder.iterdir() if path.suffix in SUFFIXES)
        yield from (path for path in entries if path.is_file())


def _sha256(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and path.resolve().parent.name == "blobs" and len(blob) == DIGEST:
        return blob
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
