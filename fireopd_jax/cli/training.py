"""Commands about a run: train, sft, report, watch, data, keys."""

from pathlib import Path
from typing import Annotated

import typer

from fireopd_jax.cli.app import app

Layers = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml | key=value]...",
        help="Files, merged left to right, then overrides such as optim.learning_rate=1e-6.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check configuration, files, tokenizers and routes; print what differs from the "
        "defaults, and what a run would do.",
    ),
]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="Go on with more run.steps even where that changes the schedule of the steps to come.",
    ),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="This is one of several processes of the run: on a TPU slice, under Slurm, GKE or "
        "Open MPI, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    ),
]
Full = Annotated[bool, typer.Option("--full", help="With --dry-run: print every key.")]
KEYS = "`fireopd keys` lists every key with type, default and meaning; `fireopd keys rollout` one \
section of them. Values are YAML; quote those with spaces: 'student.lora={rank: 16}'."


# Options of other programs reach the command, which says how its settings are written.
ANY = {"ignore_unknown_options": True}


@app.command(epilog=KEYS, context_settings=ANY)
def train(
    settings: Layers = None,
    dry_run: DryRun = False,
    full: Full = False,
    extend: Extend = False,
    distributed: Distributed = False,
) -> None:
    """Distil: load or make the models, train the student, evaluate it before and after."""
    from fireopd_jax.commands.train import launch

    launch("train", settings or [], dry_run, full, extend, distributed)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="Folder of a run, such as runs/latest.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Changes: run.steps=N to go on, paths of what has moved, what is logged or kept.",
        ),
    ] = None,
    extend: Extend = False,
    distributed: Distributed = False,
) -> None:
    """Go on with an interrupted run from its newest checkpoint, or with a complete one."""
    from fireopd_jax.commands.resume import resume

    resume(run, settings or [], extend, distributed)


@app.command(epilog=KEYS, context_settings=ANY)
def sft(settings: Layers = None, dry_run: DryRun = False, full: Full = False) -> None:
    """Run only the supervised training of a run: of its teachers and its student."""
    from fireopd_jax.commands.train import launch

    launch("sft", settings or [], dry_run, full)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; by default report.html in the (first) run."),
    ] = None,
) -> None:
    """Write one page on a run, or on several side by side: results, curves, filter, tokens."""
    from fireopd_jax.commands.report import report

    print(report(runs, out))


@app.command()
def watch(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8100,
) -> None:
    """Show the page of a run while it goes on, in a browser on this machine; nothing is written."""
    from fireopd_jax.commands.watch import watch

    watch(runs, port)


@app.command(epilog=KEYS, context_settings=ANY)
def plan(
    settings: Layers = None,
    topology: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:SHAPE",
            help="Devices, such as v5p:4x4x4, v6e:8, h100:8 or cpu:8; by default those of this "
            "machine. Others need no such device, but the extra `aot`.",
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the findings here, too.")] = None,
) -> None:
    """Compile a run's programs for given devices, and say what they take and whether they fit.

    Weights and rows need not be here where the configuration states architectures. Exit status 1
    if a program does not fit.
    """
    from fireopd_jax.commands.plan import plan as planned

    raise typer.Exit(planned(settings or [], topology, json))


@app.command(epilog=KEYS)
def data(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE | CONFIG.yaml | key=value]...",
            help="Rows (files, folders, patterns, names on the hub), or a run's configuration.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what a run would make of its rows: columns, prompts, lengths, routes, problems."""
    from fireopd_jax.commands.data import show

    show(sources or [], as_json)


@app.command()
def keys(
    prefix: Annotated[
        str | None, typer.Argument(help="A section or a key, such as rollout or method.filter.")
    ] = None,
) -> None:
    """List the keys of the configuration: all, or those of one section."""
    from fireopd_jax.commands.keys import lines

    for line in lines(prefix or ""):
        print(line)
