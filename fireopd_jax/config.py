"""Config classes: frozen, validated dataclasses, and the one line that a mistake in them gets.

    @config class -> validate(plain data) -> an instance, or UserError naming file, line and key

Each section stands beside what it configures and knows nothing of the others; `recipe/` composes
them.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Le

Class = TypeVar("Class")
Tree = dict[str, Any]
Key = tuple[str, ...]
"""A key from the root down: ("optim", "learning_rate")."""
Origins = dict[Key, str]
"""Key -> where the user set it: "file.yaml:12", or "command line"."""

LOCAL = "a path on this machine"
"""In `Annotated`: marks a key whose values may be paths; names of another kind are allowed, too."""
UnitInterval = Annotated[float, Ge(0), Le(1)]


class UserError(Exception):
    """A mistake of the user's, in one clear line; the command line prints it and exits."""

    exit_status = 2
    """Exit status of the command."""


class NothingLearnt(UserError):
    """A run that cannot learn, or has not: every update was skipped, or many in a row."""

    exit_status = 1


class Section:
    """What every config class may override."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Yield (field, reason) for fields that the other fields of this section make idle."""
        return iter(())


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[Class]) -> type[Class]:
    """Make `cls` a frozen, validated dataclass; the string below a field is its documentation."""
    # Here, as in `validate`: the command line shows help and mistyped keys without pydantic.
    from pydantic import ConfigDict
    from pydantic.dataclasses import dataclass

    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    made = dataclass(frozen=True, kw_only=True, config=settings)(cls)
    # pydantic finds the documentation of a class's own fields only: a subclass inherits it here.
    for field in dataclasses.fields(made):
        if text := made.__pydantic_fields__[field.name].description:
            field.metadata = types.MappingProxyType({**field.metadata, "description": text})
    return made  # pyright: ignore[reportReturnType]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what `name` was probably meant to be: " (did you mean ...?)", or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def dotted(key: Sequence[str]) -> str:
    """Return a key as users write it; a name with a dot in it is quoted: teachers."a.b".path."""
    return ".".join(f'"{part}"' if not part or set(part) & set('."=') else part for part in key)


def origin_of(key: Key, origins: Origins) -> str | None:
    """Return where the key, or the section around it, was set."""
    while key:
        if key in origins:
            return origins[key]
        key = key[:-1]
    return None


Hint = Callable[[Key, Any, str, str], str]
"""(key, value, type of the error, allowed values) -> what was meant, or ""."""


def validate(root: type[Class], tree: Tree, origins: Origins, hint: Hint = lambda *_: "") -> Class:
    """Return an instance of `root`; raise UserError that names the first wrong key and why.

    `hint` returns what a wrong value was probably meant to be.
    """
    from pydantic import TypeAdapter, ValidationError

    if key := _too_large(tree):
        where = f"{origin}: " if (origin := origin_of(key, origins)) else ""
        raise UserError(f"{where}{dotted(key)}: expected a number between -2**63 and 2**63")
    try:
        return TypeAdapter(root).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
    key, value = _key(tree, first["loc"])
    if first["type"].startswith("union_tag"):
        key, value = (*key, "kind"), value.get("kind")
    where = f"{origin}: " if (origin := origin_of(key, origins)) else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        message = f"expected one of {first.get('ctx', {}).get('expected_tags')}"
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(value, Mapping) else f" (it is {value!r})"
    allowed = first.get("ctx", {})
    allowed = str(allowed.get("expected_tags", allowed.get("expected", "")))
    meant = hint(key, value, first["type"], allowed)
    raise UserError(f"{where}{dotted(key) or 'configuration'}: {message}{shown}{meant}")


def _too_large(tree: Any, key: Key = ()) -> Key:
    """Return the key of the first whole number that no computation has room for, () for none."""
    if isinstance(tree, int) and abs(tree) >= 2**63:
        return key
    parts = enumerate(tree) if isinstance(tree, list | tuple) else ()
    items = tree.items() if isinstance(tree, Mapping) else parts
    return next((found for k, v in items if (found := _too_large(v, (*key, str(k))))), ())


def idle_keys(section: Any, prefix: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield (key, reason) for keys without effect where they stand that are not the default."""
    if isinstance(section, Section):
        for field, reason in section.without_effect():
            if not _is_default(section, field):
                yield (*prefix, *field.split(".")), reason
    if dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            yield from idle_keys(getattr(section, field.name), (*prefix, field.name))
    elif isinstance(section, Mapping):
        for name, value in section.items():
            yield from idle_keys(value, (*prefix, str(name)))


def _is_default(section: Any, field: str) -> bool:
    """Return whether a field, or one of a section in it, has its default."""
    name, _, rest = field.partition(".")
    value = getattr(section, name)
    if rest:
        return _is_default(value, rest)
    declared = next(each for each in dataclasses.fields(section) if each.name == name)
    return value == declared.default


def _key(tree: Any, loc: Sequence[str | int]) -> tuple[Key, Any]:
    """Return the key and the value of pydantic's location, which names union members too."""
    parts: list[str] = []
    for part in loc:
        if isinstance(tree, str):  # a list was expected
            break
        try:
            tree = tree[part]
        except (LookupError, TypeError):
            continue
        parts.append(str(part))
    return tuple(parts), tree
