"""Plain Python values as JSON, with tuples, sets and other types kept apart.

    value -> encode -> JSON -> decode -> an equal value of exactly these types

A value of a subclass becomes one of its base: no method of the program's, such as an `__eq__` that
is always true, passes. What is no plain value goes by `handle`.
"""

from collections.abc import Callable
from typing import Any

ATOMS = (bool, int, float, str)
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
DEPTH = 200


def encode(value: Any, handle: Callable[[Any], Any], depth: int = 0) -> Any:
    """Return a value as JSON data; `handle(value)` stands for what is no plain value."""
    if depth > DEPTH:
        raise ValueError(f"a value is nested deeper than {DEPTH}")
    if value is None:
        return None
    for base in ATOMS:
        if isinstance(value, base):
            return value if type(value) is base else base(value)
    for name, base in SEQUENCES.items():
        if isinstance(value, base):
            items = [encode(each, handle, depth + 1) for each in base.__iter__(value)]
            return {"kind": name, "items": items}
    if isinstance(value, dict):
        items = [[encode(each, handle, depth + 1) for each in pair] for pair in dict.items(value)]
        return {"kind": "dict", "items": items}
    if isinstance(value, complex):
        return {"kind": "complex", "parts": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"kind": type(value).__name__, "hex": value.hex()}
    if type(value).__name__ in ("Decimal", "Fraction") and type(value).__module__ in (
        "decimal",
        "fractions",
    ):
        return {"kind": type(value).__name__, "text": str(value)}
    return handle(value)


def decode(data: Any, handle: Callable[[Any], Any]) -> Any:
    """Return the value of JSON data; `handle(data)` gives those that are no plain values."""
    if not isinstance(data, dict):
        return data
    kind = data["kind"]
    if kind in SEQUENCES:
        return SEQUENCES[kind](decode(each, handle) for each in data["items"])
    if kind == "dict":
        return {decode(key, handle): decode(value, handle) for key, value in data["items"]}
    if kind == "complex":
        return complex(*data["parts"])
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(data["hex"])
    if kind == "Decimal":
        from decimal import Decimal

        return Decimal(data["text"])
    if kind == "Fraction":
        from fractions import Fraction

        return Fraction(data["text"])
    return handle(data)


def no_handle(value: Any) -> Any:
    """Refuse what is no plain value."""
    raise TypeError(f"a {type(value).__name__} is no plain value")
