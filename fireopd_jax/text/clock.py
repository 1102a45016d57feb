"""The clock of a chat template, stopped: the same date whenever a prompt is written.

    template, moment -> the template after a macro `strftime_now`, and the dates that it looks up

Templates such as Llama 3.2's write the date with `strftime_now(format)`. They run in a sandbox that
takes plain data only, so that the stopped clock is a table: format -> date.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment

from fireopd_jax.config import UserError

CLOCK = "strftime_now"
"""The function of a template that reads the clock, and the argument that stops it at a moment."""
DATES = "dates_of_stopped_clock"
MACRO = (
    f"{{%- macro {CLOCK}(format) -%}}"
    f"{{%- if format not in {DATES} -%}}"
    "{{- raise_exception('strftime_now: the format ' ~ format ~ ' is not written out in the "
    "template, so that its date cannot be kept') -}}"
    "{%- endif -%}"
    f"{{{{- {DATES}[format] -}}}}"
    "{%- endmacro %}\n"  # The newline goes with the block, and the template begins a line.
)
Dates = Mapping[str, str]


def reads_clock(template: str) -> bool:
    """Return whether a template calls `strftime_now`."""
    return re.search(rf"\b{CLOCK}\b", template) is not None


def stopped_kwargs(
    template: Any, kwargs: Mapping[str, Any], moment: str | None
) -> Mapping[str, Any]:
    """Return a template's arguments with its clock stopped at `moment`, unless it already is.

    Without a moment, or for a template without a clock, they are unchanged.
    """
    if moment is None or CLOCK in kwargs or not reads_clock(str(template)):
        return kwargs
    return {**kwargs, CLOCK: moment}


def now() -> str:
    """Return the local date and time, to the second, in ISO format."""
    return datetime.now().isoformat(timespec="seconds")


def moment_of(value: Any) -> datetime:
    """Return the moment of an ISO date or date and time; raise UserError for another value."""
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        raise UserError(
            f"chat_template_kwargs: {CLOCK}={value!r} is no date; expected one such as "
            "2026-11-29 or 2026-11-29T08:30:00"
        ) from None


@functools.lru_cache(maxsize=16)
def stopped(template: str, moment: datetime, more: tuple[str, ...] = ()) -> tuple[str, Dates]:
    """Return the template with a macro instead of the clock, and the argument `DATES` of it.

    Formats are the template's texts, and `more`. Raises jinja2's TemplateSyntaxError.
    """
    return MACRO + template, dict(_dates({*_texts(template), *more}, moment))


def _texts(template: str) -> Iterator[str]:
    for token in Environment().lexer.tokenize(template):
        if token.type == "string":
            yield token.value


def _dates(formats: set[str], moment: datetime) -> Iterator[tuple[str, str]]:
    for each in formats:
        try:
            yield each, moment.strftime(each)
        except ValueError:  # No format: a text that the template uses otherwise.
            continue
