"""How the configuration of a run differs from the one it began with, and what that allows.

    before, now -> Changes: refused, or allowed and recorded

This module does not import JAX.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Keys that change what is logged or kept of a run, or where it runs, not its result but for
# rounding: a resumed run may change them.
INCIDENTAL = frozenset(
    {
        "run.name",
        "run.dir",
        "run.resume",
        "run.save_every",
        "run.keep",
        "run.keep_best",
        "run.log_every",
        "run.completions_every",
        "run.export",
        "run.max_nonfinite",
        "run.report_to",
        "run.project",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
)
OF_SERVED = re.compile(
    r"teachers\..+\.served\.("
    "api_key_env|concurrency|timeout_s|retries|backoff_s|tolerance|cache|cache_file"
    "|max_tokens_budget|max_cost|price_per_million_(in|out)put)"
)
"""The same of teachers over HTTP: a run whose budget is spent goes on with a larger one."""
OF_THE_CALL = ("run.dir", "run.resume")
"""Keys that say how a run is opened: that they differ is not worth a line."""
SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Changes:
    """Differences between a run's configuration at its start and now, each as a text."""

    refused: Sequence[str] = ()
    """Of keys that change the result."""
    allowed: Sequence[str] = ()
    """Of other keys: they are recorded, and the run goes on."""
    extended: int | None = None
    """The number of steps that the run had before, where it has more now."""
    advice: str = "Choose another run.dir, or run with the same configuration"
    """What to do about a refusal."""

    def refusal(self, folder: object) -> str:
        """Return the error for what is refused, which names `folder`."""
        more = len(self.refused) - SHOWN
        return (
            f"run.dir={folder}: the folder holds a run of another configuration: "
            f"{'; '.join(self.refused[:SHOWN])}"
            + (f"; and {more} more" if more > 0 else "")
            + f". {self.advice}"
        )


def by_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return the changes of resolved configurations as plain data."""
    every = differences(before, now, lambda key: key not in OF_THE_CALL)
    refused = differences(before, now)
    return Changes(refused, [line for line in every if line not in refused])


def differences(
    before: object, now: object, counts: Callable[[str], bool] | None = None
) -> list[str]:
    """Return, with both values, the dotted keys that differ and `counts`: may change the result."""
    old, new = _dotted(before), _dotted(now)
    counts = counts or (lambda key: not _is_incidental(key))
    absent = "(absent)"
    return [
        f"{key} was {_shown(old, key, absent)}, is now {_shown(new, key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if counts(key) and _shown(old, key, absent) != _shown(new, key, absent)
    ]


def _is_incidental(key: str) -> bool:
    return key in INCIDENTAL or OF_SERVED.fullmatch(key) is not None


def _dotted(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(flat: Mapping[str, object], key: str, absent: str) -> str:
    # By text, so that NaN equals itself and true is not 1.
    return repr(flat[key]) if key in flat else absent
