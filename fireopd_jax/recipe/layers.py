"""YAML files and key=value overrides as layers of plain data.

    a.yaml b.yaml key=value ... -> Layer, Layer, ... -> merged over the defaults

All overrides of a command line are one layer, the last, so that their order does not matter. The
origin of each value is kept, so that an error can name file and line. JAX is not imported, so that
a mistyped key is reported at once.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fireopd_jax.config import Key, Origins, Tree, UserError, dotted, nearest
from fireopd_jax.recipe.forms import refuse_other_forms
from fireopd_jax.runtime.limits import UTF_16, TooLarge, read_yaml

KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
COMMAND_LINE = "command line"
DEEPEST = 32
"""Parts of a key."""

PACKAGE = Path(__file__).parent.parent
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")
"""Folders of the shipped configurations: in an installed wheel, and in a checkout."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The keys of one file, or of all overrides of a command line."""

    tree: Tree
    origins: Origins
    texts: Mapping[Key, str]
    """Unquoted scalars as written: `2024` may be meant as a string."""
    name: str
    """The file's path, or "command line"."""


def read_layers(arguments: Sequence[str]) -> list[Layer]:
    """Return the layers of file names and `key=value` overrides; the overrides are the last one.

    Raises UserError for a missing or invalid file, and for an override that is not key=value.
    """
    files = [a for a in arguments if "=" not in a or _is_file(a)]
    _refuse_torn(arguments, files)
    refuse_other_forms(arguments, [a for a in arguments if _is_file(a)])
    layers = [read_file(find_config(name)) for name in files]
    overrides = [read_override(a) for a in arguments if a not in files]
    if overrides:
        layers.append(merged(overrides))
    return [_unsugar(layer) for layer in layers]


def find_config(name: str) -> Path:
    """Return the path of a configuration file, given by path or by name among those shipped.

    Raises UserError, with the nearest name, where there is none.
    """
    path = Path(name)
    if _is_file(name):
        return path
    inside = Path(*path.parts[1:]) if path.parts and path.parts[0] == "configs" else path
    given = not inside.name or inside.suffix
    names = [inside] if given else [inside.with_name(f"{inside.name}.yaml")]
    for folder in SHIPPED if inside.name else ():
        for below in ("", "method"):
            for file in names:
                if (folder / below / file).is_file():
                    return folder / below / file
    if path.exists() or path.is_symlink():
        kind = "a folder" if path.is_dir() else "no plain file"
        raise UserError(f"{name}: {kind}; expected a configuration, a .yaml file")
    if name == "-":
        raise UserError("-: a configuration is not read from standard input; expected a .yaml file")
    known = {str(f.relative_to(folder)) for folder in SHIPPED for f in folder.rglob("*.yaml")}
    beside = {str(path.parent / each) for each in _yaml_files(path.parent)}
    meant = nearest(name, sorted(beside)) or nearest(str(inside), sorted(known))
    raise UserError(f"{name}: no such configuration file{meant}")


def read_file(path: Path) -> Layer:
    """Return the layer of one YAML file, with the line of each key.

    Raises UserError for invalid YAML, and for a key that is set twice.
    """
    try:
        node, tree = read_yaml(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        kind = "UTF-16" if error.object[:2] in UTF_16 else "not UTF-8"
        raise UserError(f"{path}:{line}: the text is {kind}; save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}: not valid YAML: {said}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return Layer({}, {}, {}, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: expected `key: value` pairs at the top")
    origins: Origins = {}
    texts: dict[Key, str] = {}

    def visit(node: yaml.Node, prefix: Key) -> None:
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            texts[prefix] = node.value
        if not isinstance(node, yaml.MappingNode):
            return
        seen = set()
        for name, value in node.value:
            where = f"{path}:{name.start_mark.line + 1}"
            if name.tag not in KEY_TAGS:
                raise UserError(f"{where}: expected a name as key, found {name.value!r}")
            key = (*prefix, name.value)
            if key in seen:
                raise UserError(f"{where}: {dotted(key)} is set twice")
            seen.add(key)
            origins[key] = where
            visit(value, key)

    visit(node, ())
    return Layer(tree, origins, texts, str(path))


def read_override(text: str) -> Layer:
    """Return the layer of one `a.b.c=value`; a value that is not valid YAML is a string."""
    name, _, value = text.partition("=") if '"' not in text.partition("=")[0] else _quoted(text)
    key = split_key(name.strip())
    if len(key) > DEEPEST:
        raise UserError(f"{name[:40]!r}...: {len(key)} parts; no key has more than {DEEPEST}")
    if not all(key):
        raise UserError(f"{text!r}: expected key=value with a dotted key")
    if not value.strip():
        raise UserError(
            f"{text!r}: the value is empty; write {dotted(key)}=null for none, "
            f"{dotted(key)}=\"''\" for an empty text"
        )
    try:
        inner = read_yaml(value)[1]
    except TooLarge as error:
        raise UserError(f"{dotted(key)}: {error}") from None
    except yaml.YAMLError:
        inner = value
    if isinstance(inner, str | None) and re.search(r"\s#", value) and value.strip()[0] not in "'\"":
        inner = value.strip()  # a file has comments, an override has not
    tree: Tree = {key[-1]: inner}
    for part in reversed(key[:-1]):
        tree = {part: tree}
    return Layer(tree, {key: COMMAND_LINE}, {key: value.strip()}, COMMAND_LINE)


def merged(layers: Sequence[Layer]) -> Layer:
    """Return overrides as one layer; of several values for a key the last one counts."""
    tree: Tree = {}
    origins: Origins = {}
    texts: dict[Key, str] = {}
    for layer in layers:
        tree = _merge(tree, layer.tree)
        origins |= layer.origins
        texts |= dict(layer.texts)
    return Layer(tree, origins, texts, layers[0].name)


def overlay(base: Tree, layer: Mapping[str, Any]) -> Tree:
    """Return `base` with the values of `layer` merged over it.

    Sections are merged key by key. A section with a `kind` replaces the old one as a whole; a
    model's `path` removes its earlier `architecture` and `sft`.
    """
    out = dict(base)
    for key, value in layer.items():
        old = out.get(key)
        if not (isinstance(value, Mapping) and isinstance(old, Mapping)) or "kind" in value:
            out[key] = overlay({}, value) if isinstance(value, Mapping) else value
        else:
            old = dict(old)
            if value.get("path") is not None and "architecture" in old:
                old = {k: v for k, v in old.items() if k not in ("architecture", "sft")}
            out[key] = overlay(old, value)
    return out


def _merge(one: Tree, other: Mapping[str, Any]) -> Tree:
    """Return both trees merged; where both have a value, that of `other`."""
    out = dict(one)
    for key, value in other.items():
        old = out.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        out[key] = _merge(dict(old), value) if both else value  # pyright: ignore[reportCallIssue, reportArgumentType]
    return out


def _unsugar(layer: Layer) -> Layer:
    """Return the layer with `teacher` renamed to `teachers.default`."""
    if "teacher" not in layer.tree:
        return layer

    def renamed(key: Key) -> Key:
        return ("teachers", "default", *key[1:]) if key[0] == "teacher" else key

    tree = dict(layer.tree)
    tree = _merge({"teachers": {"default": tree.pop("teacher")}}, tree)
    origins = {renamed(key): where for key, where in layer.origins.items()}
    texts = {renamed(key): text for key, text in layer.texts.items()}
    return Layer(tree, origins, texts, layer.name)


def split_key(name: str) -> Key:
    """Return the parts of a dotted key; a part in double quotes may contain dots."""
    parts, rest = [], name
    while True:
        if rest.startswith('"') and '"' in rest[1:]:
            part, _, rest = rest[1:].partition('"')
            parts.append(part)
            if not rest:
                return tuple(parts)
            rest = rest.removeprefix(".")
        else:
            part, dot, rest = rest.partition(".")
            parts.append(part)
            if not dot:
                return tuple(parts)


def _quoted(text: str) -> tuple[str, str, str]:
    """Return an override split at the first = outside double quotes, as (key, "=", value)."""
    inside = False
    for index, character in enumerate(text):
        inside ^= character == '"'
        if character == "=" and not inside:
            return text[:index], "=", text[index + 1 :]
    return text, "", ""


def _refuse_torn(arguments: Sequence[str], files: Sequence[str]) -> None:
    """Raise UserError for a value that the shell has split at spaces: `a={b: 1}` unquoted."""
    for index, argument in enumerate(arguments):
        if argument in files or not _open_brackets(argument.partition("=")[2]):
            continue
        whole = [argument]
        for following in arguments[index + 1 :]:
            whole.append(following)
            if not _open_brackets(" ".join(whole).partition("=")[2]):
                raise UserError(
                    f"{argument!r}: the shell has split this value at its spaces; quote it: "
                    f"'{' '.join(whole)}'"
                )


def _open_brackets(value: str) -> bool:
    """Return whether a value opens a bracket that it does not close."""
    return value[:1] in ("{", "[") and value.count(value[0]) > value.count(
        {"{": "}", "[": "]"}[value[0]]
    )


def _yaml_files(folder: Path) -> list[str]:
    """Return the names of the configurations in a folder; none where it cannot be listed."""
    try:
        return [name for name in os.listdir(folder) if name.endswith((".yaml", ".yml"))]
    except OSError:
        return []


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a file name
        return False
