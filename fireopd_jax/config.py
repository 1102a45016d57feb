"""From YAML files and dotted overrides to one validated, frozen configuration.

    defaults <- a.yaml <- b.yaml <- key=value ...   laid as plain dicts, then validated once

Overriding one field therefore never resets its siblings. Where each value came from is
remembered, so that an error can name file and line. This module knows nothing of any section:
those stand beside what they configure and are composed in `recipe.py`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Class = TypeVar("Class")
Tree = dict[str, Any]
Origins = dict[str, str]
"""Dotted key -> where the user set it: "file.yaml:12", or "command line"."""

UnitInterval = Annotated[float, Field(ge=0, le=1)]

KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")

SHIPPED = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")
"""Where the configurations lie in an installed wheel, and in a checkout."""


class UserError(Exception):
    """A mistake of the user's, in one clear line; the command line prints it and exits 2."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[Class]) -> type[Class]:
    """Make `cls` a frozen, validated dataclass; the string below a field is its documentation."""
    settings = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    made = dataclass(frozen=True, kw_only=True, config=settings)(cls)
    # pydantic finds the documentation of a class's own fields only: a subclass takes it from here.
    for field in dataclasses.fields(made):
        if text := made.__pydantic_fields__[field.name].description:
            field.metadata = types.MappingProxyType({**field.metadata, "description": text})
    return made  # pyright: ignore[reportReturnType]


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what `name` was probably meant to be: " (did you mean ...?)", or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def find_config(name: str) -> Path:
    """Find a configuration file by path, or by its name among those shipped."""
    path = Path(name)
    if path.is_file():
        return path
    inside = Path(*path.parts[1:]) if path.parts and path.parts[0] == "configs" else path
    for folder in SHIPPED:
        for candidate in (folder / inside, folder / "method" / inside):
            for file in (candidate, candidate.with_suffix(".yaml")):
                if file.is_file():
                    return file
    known = sorted(
        {str(f.relative_to(folder)) for folder in SHIPPED for f in folder.rglob("*.yaml")}
    )
    raise UserError(f"{name}: no such configuration file{nearest(str(inside), known)}")


def read_yaml(path: Path) -> tuple[Tree, Origins]:
    """Read one file into a dict, and note the line of each key."""
    try:
        text = path.read_text(encoding="utf-8")
        node, tree = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected `key: value` pairs at the top")
    origins: Origins = {}

    def visit(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        seen = set()
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            where = f"{path}:{key.start_mark.line + 1}"
            if key.tag not in KEY_TAGS:
                raise UserError(f"{where}: expected a name as key, found {key.value!r}")
            if dotted in seen:
                raise UserError(f"{where}: {dotted} is set twice")
            seen.add(dotted)
            origins[dotted] = where
            visit(value, f"{dotted}.")

    visit(node, "")
    return tree, origins


def read_override(text: str) -> tuple[Tree, Origins]:
    """Read one `a.b.c=value`; the value is YAML."""
    key, _, value = text.partition("=")
    parts = key.strip().split(".")
    if not all(parts):
        raise UserError(f"{text!r}: expected key=value with a dotted key")
    try:
        inner = yaml.safe_load(value)
    except yaml.YAMLError:
        inner = value
    tree: Tree = {parts[-1]: inner}
    for part in reversed(parts[:-1]):
        tree = {part: tree}
    return tree, {".".join(parts): "command line"}


def lay(base: Tree, layer: Mapping[str, Any]) -> Tree:
    """Lay one tree over another.

    Sections merge; a section that names another `kind` replaces, and so does one that names a
    `path` where an embedded `architecture` stood.
    """
    out = dict(base)
    for key, value in layer.items():
        old = out.get(key)
        if not (isinstance(value, Mapping) and isinstance(old, Mapping)):
            out[key] = lay({}, value) if isinstance(value, Mapping) else value
        elif "kind" in value and value["kind"] != old.get("kind"):
            out[key] = lay({}, value)
        else:
            old = dict(old)
            if value.get("path") is not None and "architecture" in old:
                old = {k: v for k, v in old.items() if k not in ("architecture", "sft")}
            out[key] = lay(old, value)
    return out


def resolve(
    root: type[Class], arguments: Sequence[str], aliases: Mapping[str, str]
) -> tuple[Class, Origins]:
    """Lay files and overrides over the defaults and validate the sum.

    `arguments` are file names and `key=value` overrides, in order. `aliases` maps names that
    users bring from other tools to ours; they are refused with ours named.
    """
    tree = TypeAdapter(root).dump_python(root(), mode="json")
    origins: Origins = {}
    files = [a for a in arguments if "=" not in a or _is_file(a)]
    layers = [read_yaml(find_config(name)) for name in files]
    layers += [read_override(a) for a in arguments if a not in files]
    for layer, where in layers:
        layer, where = _unsugar(layer, where)
        for dotted in _unknown(root, layer, lay(tree, layer)):
            raise UserError(_unknown_key(root, dotted, where, aliases))
        tree = lay(tree, layer)
        # Those set last stand last.
        origins = {key: at for key, at in origins.items() if key not in where} | where
    # A section that another kind or a path has replaced is no longer the user's.
    origins = {key: where for key, where in origins.items() if _stands(tree, key)}
    return validate(root, tree, origins), origins


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a file name
        return False


def _stands(tree: Any, dotted: str) -> bool:
    """Tell whether the key is still in the tree."""
    for part in dotted.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _unsugar(layer: Tree, origins: Origins) -> tuple[Tree, Origins]:
    """Read `teacher` as `teachers.default`."""
    if "teacher" not in layer:
        return layer, origins
    layer = dict(layer)
    layer = lay({"teachers": {"default": layer.pop("teacher")}}, layer)
    renamed = {
        f"teachers.default{key.removeprefix('teacher')}"
        if key.split(".")[0] == "teacher"
        else key: at
        for key, at in origins.items()
    }
    return layer, renamed


def validate(root: type[Class], tree: Tree, origins: Origins) -> Class:
    """Build the configuration, or say in one line which key is wrong and why."""
    try:
        return TypeAdapter(root).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
    dotted, value = _path(tree, first["loc"])
    if first["type"].startswith("union_tag"):
        dotted, value = f"{dotted}.kind", value.get("kind")
    where = f"{origin}: " if (origin := _origin(dotted, origins)) else ""
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = "" if isinstance(value, Mapping) else f" (it is {value!r})"
    raise UserError(f"{where}{dotted or 'configuration'}: {message}{shown}")


def _origin(dotted: str, origins: Origins) -> str | None:
    """Find where the key, or the section around it, was set."""
    while dotted:
        if dotted in origins:
            return origins[dotted]
        dotted = dotted.rpartition(".")[0]
    return None


def _path(tree: Any, loc: Sequence[str | int]) -> tuple[str, Any]:
    """Turn pydantic's location, which names union members too, into the user's dotted key."""
    parts: list[str] = []
    for part in loc:
        try:
            tree = tree[part]
        except (LookupError, TypeError):
            continue
        parts.append(str(part))
    return ".".join(parts), tree


def members(annotation: Any) -> list[Any]:
    """Give the alternatives of an annotation, out of `Annotated`, `None` and unions."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in members(part)]
    return [] if annotation is type(None) else [annotation]


def _section(annotation: Any, data: Any) -> Any:
    """Pick the config class that `data` is for: by its `kind` where there are several."""
    sections = [m for m in members(annotation) if dataclasses.is_dataclass(m)]
    kind = data.get("kind") if isinstance(data, Mapping) else None
    for section in sections:
        if len(sections) == 1 or kind == kind_of(section):
            return section
    return None


def kind_of(section: Any) -> str | None:
    """Give the `kind` tag of a variant, or None."""
    return next((f.default for f in dataclasses.fields(section) if f.name == "kind"), None)  # pyright: ignore[reportReturnType]


def _unknown(annotation: Any, layer: Any, whole: Any, prefix: str = "") -> Iterator[str]:
    """Find the dotted keys of `layer` that no config class has; `whole` tells the kinds."""
    if not isinstance(layer, Mapping):
        return
    section = _section(annotation, whole)
    if section is not None:
        hints = typing.get_type_hints(section, include_extras=True)
        for key, value in layer.items():
            if key not in hints:
                yield f"{prefix}{key}"
            else:
                yield from _unknown(hints[key], value, whole.get(key), f"{prefix}{key}.")
        return
    for member in members(annotation):
        arguments = typing.get_args(member)
        if typing.get_origin(member) is dict and arguments[1] is not Any:
            for key, value in layer.items():
                yield from _unknown(arguments[1], value, whole.get(key), f"{prefix}{key}.")


def keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """List every dotted key below a config class, of all variants."""
    for section in members(annotation):
        if dataclasses.is_dataclass(section):
            hints = typing.get_type_hints(section, include_extras=True)
            for field in dataclasses.fields(section):
                yield f"{prefix}{field.name}"
                yield from keys(hints[field.name], f"{prefix}{field.name}.")
        elif typing.get_origin(section) is dict:
            yield from keys(typing.get_args(section)[1], f"{prefix}NAME.")


def _unknown_key(root: type, dotted: str, origins: Origins, aliases: Mapping[str, str]) -> str:
    parts = dotted.split(".")
    # Of an unknown section, also what stands inside: names of other tools have sections of theirs.
    names = [dotted, *(key for key in origins if key.startswith(f"{dotted}."))]
    where = _origin(dotted, origins) or _origin(names[-1], origins) or "configuration"
    for name in names:
        if ours := aliases.get(name.rpartition(".")[2]):
            where = _origin(name, origins) or where
            return f"{where}: unknown key {name!r}: here it is {ours!r}"

    def concrete(key: str) -> str:
        named = key.split(".")
        return ".".join(
            parts[i] if part == "NAME" and i < len(parts) else part for i, part in enumerate(named)
        )

    known = list(dict.fromkeys(concrete(key) for key in keys(root)))
    if dotted in known:
        section = dotted.rpartition(".")[0]
        return f"{where}: {dotted!r} belongs to another kind of {section!r} than the one chosen"
    siblings = [k for k in known if k.split(".")[:-1] == parts[:-1]]
    close = difflib.get_close_matches(dotted, siblings, n=1, cutoff=0.6)
    namesakes = [k for k in known if k.split(".")[-1] == parts[-1]]
    close = close or sorted(namesakes, key=lambda k: k.count("."))[:1]
    close = close or difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{where}: unknown key {dotted!r}{hint}"
