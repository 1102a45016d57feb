"""Options that several commands have, and their values.

Nothing here imports JAX: the command line answers `--help` with it.
"""

from typing import Annotated, Any, TypeVar

import typer

from fireopd_jax.config import UserError, nearest

Default = TypeVar("Default", float, None)
HOTTEST = 1e6
"""Highest temperature: far higher ones are infinite in float32."""

LONGEST, MOST_SAMPLES, LARGEST = 2**24, 100_000, 2**31 - 1
"""Tokens of a response, responses to a prompt, and any number that a device is passed."""

AnyModel = Annotated[str, typer.Argument(help="A run, a model's folder, or a name on the hub.")]
OfRun = Annotated[
    str, typer.Option("--model", help="Of a run: student, student_start, teacher_NAME ...")
]
Greedy = Annotated[bool, typer.Option("--greedy", help="The same as --temperature 0.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=HOTTEST, help="By default 1.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="File, plain, chatml, tulu, question, or one of the tokenizer's by name; by default "
        "the model's own."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16; by default the model's own, on a CPU float32."),
]
Slots = Annotated[
    int | None,
    typer.Option(
        min=1, max=2**16, help="Responses decoded at a time, per replica; does not change them."
    ),
]
Tensor = Annotated[int, typer.Option(min=1, help="Devices per replica of the model.")]
IgnoredKeys = Annotated[
    list[str] | None,
    typer.Option(help="Keys of the folder's config.json to ignore, as an error names them: a,b."),
]


def comma_separated(given: list[str] | None) -> tuple[str, ...]:
    """Return the names of an option that may be repeated, and take several: `a,b` or `[a, b]`."""
    names = (name.strip() for each in given or () for name in each.strip("[] ").split(","))
    return tuple(name for name in names if name)


def known_dtype(dtype: str | None) -> Any:
    """Return `dtype`; raise UserError unless it is float32, bfloat16 or None."""
    known = ("float32", "bfloat16")
    if dtype not in (None, *known):
        raise UserError(f"--dtype {dtype}: expected {' or '.join(known)}{nearest(dtype, known)}")
    return dtype


def temperature_of(greedy: bool, temperature: float | None, default: Default) -> float | Default:
    """Return the temperature, 0 if greedy; raise UserError where both are given."""
    if greedy and temperature:
        raise UserError(f"--greedy and --temperature {temperature:g} conflict; give one of them")
    return 0.0 if greedy else default if temperature is None else temperature
