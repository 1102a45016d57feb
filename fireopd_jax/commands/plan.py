"""`fireopd plan`: does a run fit, before anybody pays for the devices?

    settings, --topology -> Forecast -> tables, a verdict, and a JSON file

Exit status 0 if it fits, 1 if it does not.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fireopd_jax.commands.journal import say as tell
from fireopd_jax.recipe.keys import check_layers
from fireopd_jax.recipe.layers import read_layers
from fireopd_jax.terminal.record import say

LISTED = ("rollout", "score", "update", "sft")
"""Programs with a line of their own, by the beginning of their names."""


def plan(settings: Sequence[str], topology: str | None, file: Path | None) -> int:
    """Print what a run would take on the devices of a topology; return the exit status."""
    check_layers(read_layers(settings))
    from fireopd_jax.runtime.topologies import find_topology

    found = find_topology(topology)  # before anything else uses JAX
    from fireopd_jax.recipe.schema import load
    from fireopd_jax.runtime.files import write_atomically
    from fireopd_jax.terminal.working import working
    from fireopd_jax.training.forecast import forecast

    loaded = load(settings)
    for note in loaded.notes:
        tell(note)
    with working("compiling the programs", after=2.0):
        made = forecast(loaded.config, found, tell)
    _print(made)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(as_json(made), indent=2) + "\n")
    return 0 if made.fits else 1


def as_json(made: Any) -> dict[str, Any]:
    """Return a forecast as plain data: bytes, tokens, seconds."""
    from fireopd_jax.training.forecast import ASSUMED

    return dataclasses.asdict(made) | {
        "verdict": made.verdict,
        "largest": made.largest,
        "assumed": list(ASSUMED),
    }


def _print(made: Any) -> None:
    from fireopd_jax.terminal.tables import table
    from fireopd_jax.training.ahead import keys_of
    from fireopd_jax.training.forecast import ASSUMED

    for note in made.notes:
        say(note)
    mesh = " x ".join(f"{name} {count}" for name, count in made.mesh.items())
    say(f"{made.topology}: mesh {mesh}, {size(made.memory)} on each of {made.devices} devices")
    models = [
        (name, each.parameters, size(each.bytes), size(each.bytes_per_device))
        for name, each in made.models.items()
    ]
    table(models, ("model", "parameters", "in all", "on a device"))
    programs = [
        (name, size(each.arguments), size(each.beyond), size(each.peak), _sent(each.collectives))
        for name, each in made.programs.items()
        if name.startswith(LISTED)
    ]
    table(programs, ("program", "inputs", "beyond", "in use", "collectives"))
    for key, choice in made.choices.items():
        remat = f", remat={choice.remat}" if choice.remat != "none" else ""
        say(f"{key}.{choice}{remat}")
    if made.largest_tokens is not None:
        say(f"largest optim.micro_batch_tokens that fits: {made.largest_tokens:,}")
    if made.seconds is not None:
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in made.seconds.items())
        say(f"a step: about {sum(made.seconds.values()):.3g} s ({parts}), if {'; '.join(ASSUMED)}")
    say(f"{len(made.programs)} programs, compiled in {made.compiled_s:.0f} s")
    if made.process_bytes is not None:
        say(f"the whole process, with libraries and the compiler: about {size(made.process_bytes)}")
    share = f"{made.largest} needs {size(made.programs[made.largest].peak)} of {size(made.memory)}"
    smaller = "" if made.fits else f"; expected a smaller {keys_of(made.largest)}, or more fsdp"
    say(f"{made.verdict}: {share}{smaller}")


def size(count: float | int) -> str:
    """Return bytes in words: "31 MiB", "6.7 GiB"."""
    value, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def _sent(collectives: Mapping[str, Any]) -> str:
    return ", ".join(f"{own.count} {kind} {size(own.bytes)}" for kind, own in collectives.items())
