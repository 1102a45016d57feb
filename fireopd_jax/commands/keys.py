"""`fireopd keys`: the keys of the configuration, section by section.

keys -> all sections; the keys that all models share are listed once, under student
keys rollout, keys method.filter, keys optim.learning_rate -> the keys with this prefix
"""

from collections.abc import Iterator

from fireopd_jax.config import UserError, dotted, nearest
from fireopd_jax.recipe.keys import Field, shipped_schema
from fireopd_jax.recipe.layers import split_key

SHARED = ("teachers.NAME", "base")
"""Sections of models; their keys of the same name as those of `student` are listed there."""


def lines(prefix: str) -> Iterator[str]:
    """Yield the lines to print. Raises UserError for a prefix that no key has."""
    wanted = _as_listed(prefix)
    fields = [f for f in shipped_schema().fields() if not wanted or _below(dotted(f.key), wanted)]
    if not fields:
        sections = {dotted(f.key[:-1]) for f in shipped_schema().fields()}
        names = sections | {dotted(f.key) for f in shipped_schema().fields()}
        raise UserError(f"{prefix}: no such key or section{nearest(wanted, names)}")
    shared = set() if wanted else {f.key[1:] for f in fields if f.key[0] == "student"}
    heading = None
    for field in fields:
        if field.type == "section" or (len(field.key) == 1 and not wanted):
            continue
        model = next((m for m in SHARED if _below(dotted(field.key), m)), None)
        if model is not None and field.key[len(model.split(".")) :] in shared:
            continue
        section = dotted(field.key[:-1]) + (f" (kind: {field.kind})" if field.kind else "")
        if section != heading:
            if heading is not None:
                yield ""
            if section:
                yield f"{section}:"
            heading = section
        yield from _shown(field)
    if not wanted:
        yield ""
        yield "teachers.NAME and base have the keys of student, except lora;"
        yield "teacher.x is short for teachers.default.x"


def _shown(field: Field) -> Iterator[str]:
    default = "" if field.default is None else f" = {field.default}"
    yield f"  {dotted(field.key)}: {field.type}{default}"
    if field.meaning:
        yield f"      {field.meaning}"


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _as_listed(prefix: str) -> str:
    """Return the prefix with any teacher's name replaced by NAME, as keys are listed."""
    parts = list(split_key(prefix)) if prefix else []
    if parts[:1] == ["teacher"]:
        parts = ["teachers", "NAME", *parts[1:]]
    elif parts[:1] == ["teachers"] and len(parts) > 1:
        parts[1] = "NAME"
    return ".".join(parts)
