"""The keys of a configuration, from the schema that is shipped with the configurations.

    configs/schema.json -> Schema: keys with type, default and meaning
    layers -> check_layers -> UserError for an unknown key, with the nearest that exists

`fireopd schema` writes the file from the config classes; a test compares both. So keys can be
checked and listed without importing the classes, which takes seconds.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fireopd_jax.config import Key, Tree, UserError, dotted, origin_of
from fireopd_jax.recipe.hints import unknown_keys
from fireopd_jax.recipe.layers import SHIPPED, Layer, overlay

Node = Mapping[str, Any]
"""A JSON schema."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A key of the configuration."""

    key: Key
    type: str
    default: str | None
    """As JSON; None where the key must be given."""
    meaning: str
    kind: str | None
    """The variant that the key belongs to, where a section has several."""
    kinds: tuple[tuple[Key, str], ...]
    """The variants that it belongs to, from the root down: (section, kind) of each."""


@functools.cache
def shipped_schema() -> "Schema":
    """Return the schema of this version."""
    for folder in SHIPPED:
        if (folder / "schema.json").is_file():
            return Schema(json.loads((folder / "schema.json").read_text(encoding="utf-8")))
    raise FileNotFoundError(f"no schema.json in {SHIPPED[0]} or {SHIPPED[1]}")


@dataclasses.dataclass(frozen=True)
class Schema:
    """The JSON schema of the configuration."""

    root: Node

    def defaults(self) -> Tree:
        """Return the default configuration as plain data."""
        return {name: field.get("default", {}) for name, field in self.root["properties"].items()}

    def sections(self, node: Node) -> list[Node]:
        """Return the config classes that a field may hold."""
        if "$ref" in node:
            return [self.root["$defs"][node["$ref"].rpartition("/")[2]]]
        alternatives = node.get("anyOf", node.get("oneOf", node.get("allOf", [])))
        return [section for each in alternatives for section in self.sections(each)]

    def section(self, node: Node, data: Any) -> Node | None:
        """Return the config class of `data`, by its `kind` if there are several, else None."""
        sections = self.sections(node) if "properties" not in node else [node]
        kind = data.get("kind") if isinstance(data, Mapping) else None
        for section in sections:
            if len(sections) == 1 or kind == kind_of(section):
                return section
        return None

    def named(self, node: Node) -> Node | None:
        """Return the schema of the values of a mapping by name, such as `teachers`, else None."""
        extra = node.get("additionalProperties")
        return extra if isinstance(extra, Mapping) and self.sections(extra) else None

    def unknown(
        self, layer: Any, whole: Any, node: Node | None = None, prefix: Key = ()
    ) -> Iterator[Key]:
        """Yield the keys of `layer` that no config class has; `whole` holds the chosen kinds."""
        node = self.root if node is None else node
        if not isinstance(layer, Mapping):
            return
        section, inner = self.section(node, whole), self.named(node)
        for name, value in layer.items():
            key, below = (*prefix, str(name)), _get(whole, name)
            if section is not None and name in section["properties"]:
                yield from self.unknown(value, below, section["properties"][name], key)
            elif section is not None:
                yield key
            elif inner is not None:
                yield from self.unknown(value, below, inner, key)

    def find(self, key: Key, whole: Any) -> Node | None:
        """Return the schema of a key under the kinds chosen in `whole`; None if unknown."""
        node: Node = self.root
        for part in key:
            section, inner = self.section(node, whole), self.named(node)
            if section is not None and part in section["properties"]:
                node = section["properties"][part]
            elif inner is not None:
                node = inner
            else:
                return None
            whole = _get(whole, part)
        return node

    def chosen(self, whole: Any, node: Node | None = None, prefix: Key = ()) -> Iterator[Key]:
        """Yield every key that may be set under the names and kinds of `whole`."""
        node = self.root if node is None else node
        section = self.section(node, whole)
        if section is not None:
            for name, field in section["properties"].items():
                yield (*prefix, name)
                yield from self.chosen(_get(whole, name), field, (*prefix, name))
        elif (inner := self.named(node)) is not None and isinstance(whole, Mapping):
            for name in whole:
                yield from self.chosen(whole[name], inner, (*prefix, str(name)))

    @functools.cached_property
    def every_field(self) -> tuple[Field, ...]:
        """Every key of all variants."""
        return tuple(self.fields())

    def kinds_of(self, key: Key) -> list[tuple[Key, tuple[str, ...]]]:
        """Return the kinds with which a key exists, of each section that has several.

        [] for a key that exists with all kinds, or with none. Teachers and sets may have any name.
        """
        named = _without_names(key)
        found = [each.kinds for each in self.every_field if each.key == named and each.kinds]
        if not found:
            return []
        # Of nested choices the first; of the innermost one all that have the key.
        *outer, (section, _) = found[0]
        same = [kinds[-1][1] for kinds in found if list(kinds[:-1]) == outer]
        return [(each, (kind,)) for each, kind in outer] + [(section, tuple(dict.fromkeys(same)))]

    def fields(
        self,
        node: Node | None = None,
        prefix: Key = (),
        kinds: tuple[tuple[Key, str], ...] = (),
    ) -> Iterator[Field]:
        """Yield every key of all variants; in mappings by name, NAME stands for the name."""
        node = self.root if node is None else node
        sections = [node] if "properties" in node else self.sections(node)
        for section in sections:
            kind = kind_of(section) if len(sections) > 1 else None
            under = kinds if kind is None else (*kinds, (prefix, kind))
            for name, field in section["properties"].items():
                key = (*prefix, name)
                default = json.dumps(field["default"]) if "default" in field else None
                meaning = " ".join(field.get("description", "").split())
                yield Field(key, type_of(field), default, meaning, kind, under)
                yield from self.fields(field, key, under)
        if (inner := self.named(node)) is not None:
            yield from self.fields(inner, (*prefix, "NAME"), kinds)


def check_layers(layers: Sequence[Layer], schema: Schema | None = None) -> tuple[Tree, list[Layer]]:
    """Return the defaults merged with the layers, and the layers with scalars typed by the schema.

    Raises UserError for an unknown key, and for a boolean where none is expected.
    """
    schema = shipped_schema() if schema is None else schema
    tree, read = schema.defaults(), []
    for layer in layers:
        whole = overlay(tree, layer.tree)
        if error := unknown_keys(schema, layer, whole):
            raise UserError(error)
        layer = _with_texts(schema, layer, whole)
        tree = overlay(tree, layer.tree)
        read.append(layer)
    return tree, read


def kind_of(section: Node) -> str | None:
    """Return the `kind` of a variant, or None."""
    return section["properties"].get("kind", {}).get("const")


def type_of(field: Node) -> str:
    """Return the type of a key's values for display, such as "integer > 0"."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return json.dumps(field["const"])
    if "anyOf" in field:
        return " | ".join(type_of(part) for part in field["anyOf"])
    if "$ref" in field or "oneOf" in field:
        return "section"
    if field.get("type") == "array" and "items" in field:
        return f"list of {type_of(field['items'])}"
    bounds = {
        "minimum": "≥ {}",
        "exclusiveMinimum": "> {}",
        "maximum": "≤ {}",
        "exclusiveMaximum": "< {}",
    }
    limits = [text.format(field[key]) for key, text in bounds.items() if key in field]
    return " ".join([field.get("type", "any"), *limits])


def _get(tree: Any, name: Any) -> Any:
    return tree.get(name) if isinstance(tree, Mapping) else None


def _plain_types(field: Node) -> set[str]:
    """Return the JSON types of a field's values; empty where any is allowed."""
    if "anyOf" in field:
        return {kind for part in field["anyOf"] for kind in _plain_types(part)}
    return (
        {"object"}
        if "$ref" in field or "oneOf" in field
        else set(filter(None, [field.get("type")]))
    )


def _with_texts(schema: Schema, layer: Layer, whole: Tree) -> Layer:
    """Return the layer with the original text where YAML read a number but a string is expected."""
    tree = layer.tree
    for key, text in layer.texts.items():
        field, value = schema.find(key, whole), _value(layer.tree, key)
        if field is None or isinstance(value, str | None):
            continue
        types = _plain_types(field)
        if isinstance(value, bool) and types and not types & {"boolean", "string"}:
            raise UserError(
                f"{origin_of(key, layer.origins)}: {dotted(key)}: expected {type_of(field)}, "
                f"found {text!r}, a boolean in YAML"
            )
        if "string" in types and not isinstance(value, Mapping | list):
            tree = _replaced(tree, key, text)
    return dataclasses.replace(layer, tree=tree)


def _value(tree: Any, key: Key) -> Any:
    for part in key:
        tree = _get(tree, part)
    return tree


def _replaced(tree: Tree, key: Key, value: Any) -> Tree:
    inner = value if len(key) == 1 else _replaced(tree[key[0]], key[1:], value)
    return {**tree, key[0]: inner}


def _without_names(key: Key) -> Key:
    """Return the key with the name of a teacher or a set replaced by NAME."""
    for prefix in (("teachers",), ("eval", "sets")):
        size = len(prefix)
        if key[:size] == prefix and len(key) > size:
            return (*prefix, "NAME", *key[size + 1 :])
    return key
