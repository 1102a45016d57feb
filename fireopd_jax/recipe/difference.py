"""What of a configuration differs from the defaults.

Config -> the keys that a file must set to load to the same
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fireopd_jax.recipe.schema import Config, as_tree

MISSING = dataclasses.MISSING


def difference(config: Config) -> dict[str, Any]:
    """Return the keys, as a tree, whose values differ from the defaults; {} where none does."""
    return _of_section(config, as_tree(config), Config())


def _of_section(section: Any, tree: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the keys of a section that differ from `default`, an instance or None.

    A section of another class than `default` is compared with the defaults of its class, and names
    its kind, which starts it anew.
    """
    same = type(section) is type(default)
    found = {} if same or "kind" not in tree else {"kind": tree["kind"]}
    for field in dataclasses.fields(section):
        value, plain = getattr(section, field.name), tree[field.name]
        usual = getattr(default, field.name) if same else _default(field)
        if field.name != "kind" and (usual is MISSING or value != usual):
            found[field.name] = _of_value(value, plain, usual)
    return found


def _of_value(value: Any, plain: Any, usual: Any) -> Any:
    """Return a value that differs from the usual one: of sections only the keys that differ."""
    if dataclasses.is_dataclass(value):
        return _of_section(value, plain, usual)
    if isinstance(value, Mapping):
        usual = usual if isinstance(usual, Mapping) else {}
        return {
            str(name): _of_value(each, plain[str(name)], usual.get(name))
            for name, each in value.items()
            if name not in usual or each != usual[name]
        }
    return plain


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default
