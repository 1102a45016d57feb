"""What a compiled program sends between devices: its collectives, counted in its text.

compiled text -> computations, loops -> Traffic by kind of collective

A loop over layers counts as often as it runs. The loop over the passes of a batch counts once,
because its number is known only with the lengths of the rows.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SMALL = 2**12
"""Bytes below which a collective does not count: sums of scalars."""

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
END = re.compile(r"\}(,|$)")  # a configuration of several lines ends with "}}"
CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind."""

    count: int = 0
    bytes: int = 0
    """Of their results, on one device."""

    def __add__(self, other: "Traffic") -> "Traffic":
        """Return both."""
        return Traffic(self.count + other.count, self.bytes + other.bytes)

    def times(self, trips: int) -> "Traffic":
        """Return what a loop sends."""
        return Traffic(self.count * trips, self.bytes * trips)


def traffic(text: str) -> dict[str, Traffic]:
    """Return the collectives of size in the text of a compiled program, by kind."""
    bodies = dict(_computations(text))
    known: dict[str, dict[str, Traffic]] = {}

    def of(name: str) -> dict[str, Traffic]:
        if name not in known:
            known[name] = {}
            for line in bodies.get(name, ()):
                if (own := CALL.search(line)) and (size := _bytes(own[1])) >= SMALL:
                    _add(known[name], {own[2]: Traffic(1, size)})
                elif loop := WHILE.search(line):
                    trips = _trips(line, bodies.get(loop[1], ()))
                    _add(known[name], of(loop[2]), trips)
                else:
                    for called in _called(line):
                        _add(known[name], of(called))
        return known[name]

    return of("") if "" in bodies else {}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield name and lines of each computation; that of the entry is ""."""
    name, lines = None, []
    for line in text.splitlines():
        if name is None and (found := HEADER.match(line)):
            name, lines = "" if found[1] else found[2], []
        elif END.match(line) and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _called(line: str) -> list[str]:
    branches = BRANCHES.search(line)
    names = [] if branches is None else [n.strip(" %") for n in branches[1].split(",")]
    return names + CALLED.findall(line)


def _trips(line: str, condition: list[str] | tuple[()]) -> int:
    """Return how often a loop runs: as XLA says, else the bound that it counts to; 1 if unknown."""
    if found := TRIPS.search(line):
        return int(found[1])
    bounds = {int(n) for each in condition for n in CONSTANT.findall(each)}
    return bounds.pop() if len(bounds) == 1 else 1


def _bytes(shapes: str) -> int:
    """Return the bytes of a result; that of an asynchronous start has its operands first."""
    sizes = []
    for kind, axes in SHAPE.findall(shapes):
        bits = BITS.search(kind)
        count = math.prod(int(axis) for axis in axes.split(",") if axis)
        sizes.append(count * (8 if bits is None else int(bits[0])) // 8)
    return sum(sizes)


def _add(total: dict[str, Traffic], more: Mapping[str, Traffic], trips: int = 1) -> None:
    for kind, own in more.items():
        total[kind] = total.get(kind, Traffic()) + own.times(trips)
