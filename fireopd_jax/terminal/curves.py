"""Learning curves as text."""

from collections.abc import Mapping, Sequence
from math import isfinite

Points = Sequence[tuple[int, int | float]]

MARKERS = "●○▲△■□"


def curve(
    points: Points | Mapping[str, Points], title: str, width: int = 60, height: int = 12
) -> str:
    """Return learning curves as a text plot, values over steps, with a marker for each series.

    Non-finite values are left out.
    """
    series = dict(points) if isinstance(points, Mapping) else {"": points}
    series = {
        name: [(step, value) for step, value in line if isfinite(value)]
        for name, line in series.items()
    }
    every = [point for line in series.values() for point in line]
    if not every:
        return f"{title}\n(no points)"
    left, right = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    canvas = [[" "] * width for _ in range(height)]
    for index, line in enumerate(series.values()):
        for step, value in line:
            # A constant series is drawn in the middle.
            up = (value - low) / (high - low) if high > low else 0.5
            along = (step - left) / (right - left) if right > left else 0.0
            row, column = round((1 - up) * (height - 1)), round(along * (width - 1))
            canvas[row][column] = MARKERS[index % len(MARKERS)]
    labels = [f"{low + (high - low) * (1 - row / max(1, height - 1)):.4g}" for row in range(height)]
    # Label only the top, the middle and the bottom row.
    named = {0, height // 2, height - 1} if high > low else {(height - 1) // 2}
    margin = max(len(labels[row]) for row in named)
    lines = [title] if title else []
    for row in range(height):
        label, axis = (labels[row], "┤") if row in named else ("", "│")
        lines.append(f"{label:>{margin}} {axis}{''.join(canvas[row]).rstrip()}")
    lines.append(f"{'':>{margin}} └{'─' * width}")
    ends = f"{left}{right:>{max(1, width - len(str(left)))}}" if right > left else f"{left}"
    lines.append(f"{'':>{margin}}  {ends}  step")
    if len(series) > 1:
        names = (f"{MARKERS[i % len(MARKERS)]} {name}" for i, name in enumerate(series))
        lines.append(f"{'':>{margin}}  {'   '.join(names)}")
    return "\n".join(lines)
