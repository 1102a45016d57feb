"""Paths in a configuration: absolute ones, which hold from any working directory.

    Config, folder -> Config whose paths on this machine are absolute

A key whose value may be a path is annotated with `LOCAL`; names on the hub and built-in names stay
as they are.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fireopd_jax.config import LOCAL, Key
from fireopd_jax.data.files import matching

Tree = TypeVar("Tree")


def absolute(config: Tree, folder: Path) -> Tree:
    """Return a configuration whose paths, relative to `folder`, are absolute."""

    def change(key: Key, path: str) -> str:
        # A built-in template has precedence over a file of that name.
        name = key[-1] == "chat_template" and not set(path) & {"/", "."}
        return path if name else anchored(path, folder)

    return with_paths(config, change)


def with_paths(section: Tree, change: Callable[[Key, str], str], prefix: Key = ()) -> Tree:
    """Return a configuration with `change(key, path)` in the place of each path."""
    if isinstance(section, Mapping):
        new = {n: with_paths(each, change, (*prefix, str(n))) for n, each in section.items()}
        return typing.cast(Tree, new)
    if isinstance(section, tuple):
        new = tuple(with_paths(each, change, (*prefix, str(i))) for i, each in enumerate(section))
        return typing.cast(Tree, new)
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        return section
    changes: dict[str, Any] = {}
    hints = typing.get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        old, key = getattr(section, field.name), (*prefix, field.name)
        if LOCAL not in getattr(hints[field.name], "__metadata__", ()):
            new = with_paths(old, change, key)
        elif isinstance(old, tuple):
            new = tuple(change(key, each) for each in old)
        else:
            new = None if old is None else change(key, old)
        if new != old:
            changes[field.name] = new
    return dataclasses.replace(section, **changes) if changes else section


def anchored(path: str, folder: Path) -> str:
    """Return the absolute form of a path in `folder`; other names as they are.

    A text is a path if something has that path, or if it begins as only paths do.
    """
    if path.startswith("builtin:") or "\n" in path or "{{" in path or not path:
        return path
    whole = str(folder / Path(path).expanduser())
    marked = path.startswith(("/", "~", "./", "../"))
    if not marked and not os.path.exists(whole) and not matching(whole):
        return path
    short = os.path.normpath(whole)
    # "a/../b" is another folder than "b" where "a" is a link.
    return short if not os.path.exists(whole) or os.path.samefile(short, whole) else whole
