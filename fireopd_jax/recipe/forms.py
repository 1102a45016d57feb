"""Forms of settings on a command line that are not key=value, as other programs have them.

arguments -> refuse_other_forms -> UserError with the argument as it should be typed
"""

import re
from collections.abc import Sequence

from fireopd_jax.config import UserError, nearest
from fireopd_jax.recipe.hints import answer

DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"
QUOTES = tuple("\u201c\u201d\u2018\u2019\u201e\u00ab\u00bb")
OPTIONS = ("dry-run", "extend", "full", "help")
ROOTS = frozenset(
    [
        "run",
        "data",
        "student",
        "teacher",
        "teachers",
        "base",
        "method",
        "rollout",
        "optim",
        "eval",
        "checks",
        "mesh",
    ]
)
"""The sections, and the short form of a teacher."""
NAME = re.compile(r"[A-Za-z_][\w.-]*")


def refuse_other_forms(arguments: Sequence[str], files: Sequence[str]) -> None:
    """Raise UserError for `--key value`, `key = value`, `key: value`, and typographic quotes.

    `files` are those of the arguments that are files of this machine, whatever they look like.
    """
    for index, argument in enumerate(arguments):
        if argument in files:
            continue
        after, then = (*arguments[index + 1 :], "", "")[:2]
        after = f"={then}" if after == "=" else after
        if argument[:2] == "--" and (near := nearest(argument[2:], OPTIONS)):
            raise UserError(f"{argument}: no such option{near}")
        if typed := _without_dashes(argument, after):
            raise UserError(f"{argument!r}: settings are key=value, without dashes: {typed}")
        if typed := _without_blanks(argument, after):
            raise UserError(f"{argument!r}: settings are key=value, without blanks: {typed}")
        if argument[:1] in QUOTES or argument.partition("=")[2][:1] in QUOTES:
            plain = "".join("'" if c in QUOTES else c for c in argument)
            raise UserError(f"{argument!r}: these quotes are typographic; type {plain}")


def _without_dashes(argument: str, after: str) -> str:
    """Return `--key=value`, `--key value` or `--key` as key=value; "" for anything else."""
    bare = argument.lstrip(DASHES)
    name, equals, value = bare.partition("=")
    if bare == argument or not NAME.fullmatch(name):
        return ""
    if not equals:
        value = after if after and after[0] not in DASHES and "=" not in after else "true"
    return _setting(name.replace("-", "_"), value)


def _without_blanks(argument: str, after: str) -> str:
    """Return `key = value`, `key= value`, `key =value` or `key: value` as key=value; else ""."""
    name, ends = argument.rstrip("=:"), argument[-1:]
    if not NAME.fullmatch(name) or not after:
        return ""
    if after.startswith("="):
        return _setting(name, after[1:] or "VALUE")
    takes = "=" not in after and not after.endswith((".yaml", ".yml"))
    bare = "." in name and name.split(".")[0] in ROOTS and not name.endswith((".yaml", ".yml"))
    return _setting(name, after) if takes and (ends in ("=", ":") or bare) else ""


def _setting(name: str, value: str) -> str:
    """Return key=value, with the key that a name of another library stands for."""
    found = answer(tuple(name.split(".")))
    if found is None or " " in found:
        return f"{name}={value}" + (f" ({found})" if found else "")
    return found if "=" in found else f"{found}={value}"
