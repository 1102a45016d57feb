"""From YAML files and dotted overrides to one validated, frozen configuration.

Files are laid left to right as plain dicts, overrides last, and the sum is validated once: overriding
one field never resets its siblings. This module knows nothing of any section: those stand beside what
they configure and are composed in `recipe.py`.
"""

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

Class = TypeVar("Class")


class UserError(Exception):
    """A mistake of the user's. Its text is one clear line; the command line prints it and exits 2."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[Class]) -> type[Class]:
    """Make `cls` a frozen, validated dataclass; the string below a field is its documentation."""
    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return dataclass(frozen=True, kw_only=True, config=settings)(cls)
