"""How far a loop is: counts, rates and times, as a line that fits a terminal or as a plain one.

done, clock -> rate, time left -> "distil student  12/100  eta 3:20  0:31  2.3 s/it  kl 0.21"

What a resumed loop restored and its first unit, which compiles, count for neither rate nor time
left. This module does not import JAX.
"""

from collections import deque
from collections.abc import Callable, Mapping

from rich.cells import cell_len, set_cell_size

from fireopd_jax.runtime.files import plain
from fireopd_jax.terminal.safe import one_line

WINDOW = 50
"""Number of newest units that the rate is taken over."""
SEPARATOR = "  "
BAR = (12, 40)
"""Least and greatest width of the bar, which fills what is left of a line."""


class Meter:
    """Counts the units of a loop of `total`, of which `start` were done before."""

    def __init__(self, label: str, total: int, start: int, clock: Callable[[], float]):
        self.label, self.total, self.start, self.done = one_line(label), total, start, start
        self.shown: Mapping[str, object] = {}
        self._clock = clock
        self.began = clock()
        # (time, units done) after each advance: the first is of the unit that may have compiled.
        self._points: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)

    def add(self, n: int, shown: Mapping[str, object]) -> None:
        """Count `n` finished units; `shown` are values displayed beside the count."""
        self.done += n
        self.shown = shown or self.shown
        if n:
            self._points.append((self._clock(), self.done))

    def elapsed(self) -> float:
        """Return the seconds since the loop began in this process."""
        return self._clock() - self.began

    def seconds_per_unit(self) -> float | None:
        """Return the mean over the newest units without the first; None before the second."""
        if len(self._points) < 2:
            return None
        (first, before), (last, after) = self._points[0], self._points[-1]
        return max(last - first, 1e-9) / max(after - before, 1)

    def left(self) -> float | None:
        """Return the seconds that are left, 0 at the end; None before they can be known."""
        if self.done >= self.total:
            return 0.0
        if (each := self.seconds_per_unit()) is None:
            return None
        waited = self._clock() - self._points[-1][0]
        return max(each * (self.total - self.done) - waited, 0.0)

    def count(self) -> str:
        """Return units done of all."""
        return f"{self.done}/{self.total}"

    def line(self, width: int, bar: str = "━─") -> str:
        """Return a line of at most `width` columns: count and time left, then what else fits."""
        count, left = self.count(), f"eta {span(self.left())}"
        room = width - len(count) - len(left) - 2 * len(SEPARATOR)
        label = fitted(self.label, max(room, 0))
        line = SEPARATOR.join(part for part in (label, count, left) if part)
        if cell_len(line) > width:
            return fitted(count, width)
        for part in (span(self.elapsed()), self.rate(), *pairs(self.shown)):
            if part and cell_len(line) + len(SEPARATOR) + cell_len(part) <= width:
                line += SEPARATOR + part
        free = min(width - cell_len(line) - len(SEPARATOR), BAR[1])
        if free >= BAR[0] and self.total:
            full = round(free * min(self.done / self.total, 1))
            line += SEPARATOR + bar[0] * full + bar[1] * (free - full)
        return line

    def plain(self) -> str:
        """Return a line for a file: everything, however long it is."""
        share = f" {self.done / self.total:.0%}" if self.total else ""
        parts = [f"{self.label} {self.count()}{share}", f"elapsed {span(self.elapsed())}"]
        parts.append(f"eta {span(self.left())}")
        parts += [part for part in (self.rate(), *pairs(self.shown)) if part]
        return ", ".join(parts)

    def rate(self) -> str:
        """Return units a second, or seconds a unit; nothing before it can be known."""
        seconds = self.seconds_per_unit()
        if seconds is None:
            return ""
        return f"{seconds:.1f} s/it" if seconds > 1 else f"{1 / seconds:.1f} it/s"


def span(seconds: int | float | None) -> str:
    """Return a time span as minutes and seconds, and hours if any; dashes where it is unknown."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def fitted(text: str, width: int) -> str:
    """Return the text if it fits into `width` columns, else its beginning with an ellipsis."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 0 else ""


def pairs(shown: Mapping[str, object]) -> list[str]:
    """Return each name with its value."""
    return [one_line(f"{name} {cell(value)}") for name, value in shown.items()]


def cell(value: object) -> str:
    """Return a value as text: numbers with four digits, None as a dash."""
    value = plain(value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
