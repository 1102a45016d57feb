"""Who talks: one model, or two by `--compare`.

MODEL                     that model
--compare RUN             the student of a run, before and after
MODEL --compare before    the same; MODEL is a run
MODEL --compare OTHER     MODEL, then another: a run, a folder, a name on the hub, or of MODEL
"""

import dataclasses
from pathlib import Path

from fireopd_jax.config import UserError, nearest
from fireopd_jax.session.finished import model_folders
from fireopd_jax.session.opening import is_run, start_of
from fireopd_jax.session.specs import slug

BEFORE = "before"


@dataclasses.dataclass(frozen=True)
class Side:
    """A model as `open_any` finds it."""

    model: str
    name: str
    title: str

    @property
    def is_run(self) -> bool:
        """Whether it is a model of a run."""
        return is_run(Path(self.model))


def sides(model: str | None, compare: str | None, name: str) -> list[Side]:
    """Return the models of a chat, those of a run before training first.

    Raises UserError for a comparison of a model with itself, or the start of what is no run.
    """
    if model is None and compare is None:
        raise UserError("expected a MODEL: a run, a model's folder, or a name on the hub")
    if model is None or (compare is not None and _same(model, compare)):
        run = model or compare
        assert run is not None
        return _before_and_after(run, name)
    if compare is None:
        return [_side(model, name)]
    if compare == BEFORE:
        return _before_and_after(model, name)
    one = _side(model, name)
    if is_run(Path(model)) and not Path(compare).exists() and "/" not in compare:
        known = model_folders(Path(model))
        if compare not in known and slug(compare.replace("_", " ", 1)) not in known:
            raise UserError(
                f"--compare {compare}: no such folder, and no model of {model}"
                f"{nearest(compare, [BEFORE, *known])}; it has {', '.join(known)}"
            )
        if compare == name:
            raise UserError(f"--compare {compare}: the same model of {model}; expected another")
        return [dataclasses.replace(one, title=name), Side(model, compare, compare)]
    return [one, _side(compare, "student")]


def _before_and_after(run: str, name: str) -> list[Side]:
    if not is_run(Path(run)):
        raise UserError(
            f"--compare: {run} is no run, so that there is no model before it; expected a run, or "
            "a MODEL and another one"
        )
    if name != "student":
        raise UserError(
            f"--model {name}: only a run's student has a model before it; expected --compare with "
            "another model"
        )
    before, start = start_of(Path(run))
    return [Side(before, start, "before"), Side(run, name, f"after ({Path(run).resolve().name})")]


def _side(model: str, name: str) -> Side:
    of_run = is_run(Path(model))
    return Side(model, name, f"{name} of {model}" if of_run else model)


def _same(one: str, other: str) -> bool:
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one == other
