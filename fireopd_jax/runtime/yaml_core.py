"""YAML with the numbers of version 1.2: `010` is ten, `1e-6` a number, `12:30` and dates are texts.

    text -> load -> plain data         text -> compose -> nodes with lines

PyYAML reads version 1.1, in which they are eight, a text, 750 and a date. The words for true and
false stay those of 1.1 (yes, no, on, off too): keys of free form expect them to be so.
"""

import re
from typing import Any

import yaml

INT = "tag:yaml.org,2002:int"
FLOAT = "tag:yaml.org,2002:float"
REPLACED = {INT, FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}


class Loader(yaml.SafeLoader):
    """Reads plain data only, as `yaml.SafeLoader`."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if pair[0] not in REPLACED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0x": 16, "0o": 8}.get(text[:2].lower(), 10)
    return int(text[2:] if base != 10 else text, base)


Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
Loader.add_implicit_resolver(
    INT, re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$"), list("-+0123456789")
)
Loader.add_constructor(INT, _integer)


class Dumper(yaml.SafeDumper):
    """Writes texts so that `load` reads texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [*Loader.yaml_implicit_resolvers.get(first, []), *pairs]
        for first, pairs in {
            **{first: [] for first in Loader.yaml_implicit_resolvers},
            **yaml.SafeDumper.yaml_implicit_resolvers,
        }.items()
    }


def dump(tree: Any) -> str:
    """Return plain data as YAML of both versions: texts that one of them reads otherwise quoted."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def load(text: str) -> Any:
    """Return the data of a YAML text; raise `yaml.YAMLError` where it is none."""
    return yaml.load(text, Loader)


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, which know their lines."""
    return yaml.compose(text, Loader)
