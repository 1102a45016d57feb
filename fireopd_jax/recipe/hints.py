"""What an unknown key, or a wrong value, was probably meant to be.

    unknown keys of a layer -> one line for each: place, key, and a key that exists, or a reason
    wrong value, expected values -> the value that was meant

Names of other libraries are answered from `aliases`, typing errors by the nearest key that may be
set in the user's own configuration.
"""

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fireopd_jax.config import Key, dotted, nearest, origin_of
from fireopd_jax.recipe.aliases import NAMES, SECTIONS
from fireopd_jax.recipe.spellings import KINDS, VALUES, WHOLE

if TYPE_CHECKING:
    from fireopd_jax.recipe.keys import Schema
    from fireopd_jax.recipe.layers import Layer

NO_SECTION = ("dataclass_type", "dict_type", "model_attributes_type", "model_type")
"""Types of pydantic's errors for a value in place of a section."""
NAMED = (("teachers",), ("eval", "sets"))
"""Sections of sections that users name."""
SHOWN = 16
"""Unknown keys that are listed at most."""


def unknown_keys(schema: "Schema", layer: "Layer", whole: Any) -> str | None:
    """Return the error for the unknown keys of a layer, None if it has none."""
    roots = list(schema.unknown(layer.tree, whole))
    keys = [key for root in roots for key in _leaves(root, layer)]
    if not keys:
        return None
    lines = [_line(schema, key, layer, whole) for key in keys]
    if len(lines) == 1:
        return lines[0]
    listed = [f"  {line}" for line in lines[:SHOWN]]
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"{layer.name}: {len(lines)} unknown keys:", *listed, *more])


def answer(key: Key) -> str | None:
    """Return the answer to a name of another library: of the longest end of the key that is one."""
    ends = (".".join(key[start:]) for start in range(len(key)))
    return next((NAMES[end] for end in ends if end in NAMES), None)


def wrong_value(key: Key, value: Any, kind: str, expected: str) -> str:
    """Return what a value was meant to be, "" if nothing is near.

    `kind` is pydantic's type of the error, `expected` its list of the allowed values, quoted.
    """
    if kind == "unexpected_keyword_argument" and key[:2] == ("data", "mixture"):
        from fireopd_jax.data.settings import Source  # with pydantic, which has raised this

        return nearest(key[-1], [field.name for field in dataclasses.fields(Source)])
    known = re.findall(r"'([^']*)'", expected)
    text = str(value).strip().lower()
    if known:
        if (meant := VALUES.get(text)) in known:
            return f" (did you mean {meant!r}?)"
        if close := nearest(text, known):
            return close
        if key and key[-1] == "kind" and text in KINDS:
            return f": {KINDS[text]}"
    elif isinstance(value, str | int | float) and kind in NO_SECTION:
        method = key[:1] == ("method",) and KINDS.get(text)
        section = key[:-1] if key[:-1] in NAMED else key
        meant = method or WHOLE.get(dotted(section))
        return f": {meant}" if meant else ""
    elif kind.startswith(("int_", "float_")) and isinstance(value, str):
        bare = value.strip(" ,;\"'\u201c\u201d\u2018\u2019")
        bare = re.sub(r",(?=\d{3}(\D|$))", "", bare).replace(",", ".")
        bare = bare.replace("\u2212", "-").replace("\u2013", "-")
        if bare != value and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", bare):
            return f" (did you mean {bare}?)"
    return ""


def _leaves(root: Key, layer: "Layer") -> Iterator[Key]:
    """Yield the unknown keys below one: all of a section of another library, else the section."""
    inside = [key for key in layer.origins if key[: len(root)] == root]
    leaves = [key for key in inside if not any(o != key and o[: len(key)] == key for o in inside)]
    foreign = root[0] in SECTIONS or any(answer(leaf) for leaf in leaves)
    yield from leaves if foreign and leaves else [root]


def _line(schema: "Schema", key: Key, layer: "Layer", whole: Any) -> str:
    """Return the error for an unknown key: its place, and the key that was probably meant."""
    inside = [where for each, where in layer.origins.items() if each[: len(key)] == key]
    where = layer.origins.get(key) or origin_of(key, layer.origins) or (inside or [layer.name])[0]
    start = f"{where}: unknown key {dotted(key)!r}"
    if kinds := schema.kinds_of(key):
        return (
            f"{where}: {dotted(key)!r} is a key of another kind of {dotted(key[:-1])!r} than the "
            f"chosen one; it is one with {_given(kinds)}"
        )
    if found := answer(key):
        return f"{start}: {_answered(schema, key, found, whole)}"
    if (plain := _plain(key)) != key and schema.find(plain, whole) is not None:
        return f"{start}: it has characters that look like others; type {dotted(plain)!r}"
    if key[0] in SECTIONS:
        return f"{start}: {SECTIONS[key[0]]}"
    return f"{start}{_nearest(key, list(schema.chosen(whole)))}"


def _answered(schema: "Schema", key: Key, found: str, whole: Any) -> str:
    """Return a sentence as it is; a key with its section, and the kinds that it is a key of."""
    if " " in found:
        return found
    name, _, value = found.partition("=")
    ours = tuple(name.split("."))
    beside = (*key[:-1], ours[-1])
    if len(key) > 1 and not value and schema.find(beside, whole) is not None:
        return f"use {dotted(beside)!r}"
    full = ("teachers", "default", *ours[1:]) if ours[0] == "teacher" else ours
    if schema.find(full, whole) is None and (kinds := schema.kinds_of(full)):
        return f"use {found!r}, with {_given(kinds)}"
    return f"use {found!r}"


def _given(kinds: Sequence[tuple[Key, tuple[str, ...]]]) -> str:
    """Return the choices of kinds, such as "method.filter.kind=random_drop or length_drop"."""
    return " and ".join(f"{dotted(key)}.kind={' or '.join(names)}" for key, names in kinds)


def _plain(key: Key) -> Key:
    """Return the key without invisible characters, and with those of other scripts' width."""
    return tuple(
        "".join(
            c for c in unicodedata.normalize("NFKC", part) if unicodedata.category(c) != "Cf"
        ).strip()
        for part in key
    )


def _nearest(key: Key, known: Sequence[Key]) -> str:
    """Return a hint at the nearest key: in the same section, of the same name, or similar."""
    siblings = [each for each in known if each[:-1] == key[:-1]]
    candidates = siblings if _close(key[-1], siblings, 0.65) else known
    if not (names := _close(key[-1], candidates, 0.65 if candidates is siblings else 0.8)):
        return ""
    # The key whose sections are most similar to those written.
    best = max((each for each in candidates if each[-1] in names), key=lambda e: _alike(e, key))
    return f" (did you mean {dotted(best)!r}?)"


def _close(name: str, keys: Sequence[Key], cutoff: float) -> list[str]:
    """Return the last part of keys that is nearest to a name: itself, if it is one of them."""
    names = sorted({each[-1] for each in keys})
    return [name] if name in names else difflib.get_close_matches(name, names, 1, cutoff)


def _alike(one: Key, other: Key) -> tuple[float, int]:
    ratio = difflib.SequenceMatcher(None, dotted(one), dotted(other)).ratio()
    return ratio, -len(one)
