"""A line chart as SVG text: logarithmic y axis, one colour per line, a legend.

{label: [(x, y), ...]} -> SVG
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 78.0, 104.0, 44.0, 54.0
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""

Lines = Mapping[str, Sequence[tuple[float, float]]]


def line_chart(lines: Lines, *, title: str, x_label: str, y_label: str) -> str:
    """Return the SVG text of the lines; points whose y is not positive and finite are left out."""
    shown = {
        label: [(x, y) for x, y in points if y > 0 and math.isfinite(y)]
        for label, points in lines.items()
    }
    every = [point for points in shown.values() for point in points]
    low, high = _decades(y for _, y in every)
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - first) / ((last - first) or 1.0) * (right - LEFT)

    def up(y: float) -> float:
        return bottom - (math.log10(y) - low) / (high - low) * (bottom - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH:g}" height="{HEIGHT:g}" fill="#fff"/>',
        _text(LEFT, 24.0, title, "start", 14),
        _text((LEFT + right) / 2, HEIGHT - 14, x_label, "middle", 13),
        f'<g transform="rotate(-90 20 {(TOP + bottom) / 2:.0f})">'
        + _text(20.0, (TOP + bottom) / 2, y_label, "middle", 13)
        + "</g>",
    ]
    for power in range(low, high + 1):
        y = up(10.0**power)
        parts += [
            f'<line x1="{LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">10'
            f'<tspan dy="-5" font-size="9">{power}</tspan></text>',
        ]
    for x in _round_steps(first, last):
        parts += [
            f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{bottom:g}" y2="{bottom + 5:g}" '
            'stroke="#888"/>',
            _text(across(x), bottom + 20, f"{x:g}", "middle", 12),
        ]
    parts.append(f'<path d="M{LEFT:g} {TOP:g}V{bottom:g}H{right:g}" fill="none" stroke="#888"/>')
    for i, (label, points) in enumerate(shown.items()):
        colour, y = COLOURS[i % len(COLOURS)], TOP + 14 + 20 * i
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
            f'<line x1="{right + 14:g}" x2="{right + 36:g}" y1="{y:g}" y2="{y:g}" '
            f'stroke="{colour}" stroke-width="2.5"/>',
            _text(right + 42, y + 4, label, "start", 12),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str, size: int) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """Return the exponents of the powers of ten that enclose the values."""
    values = list(values)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def _round_steps(first: float, last: float) -> list[float]:
    """Return at most about five round numbers of the range, one step apart."""
    rough = (last - first) / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [step * i for i in range(math.ceil(first / step), math.floor(last / step) + 1)]
