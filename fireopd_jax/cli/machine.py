"""Commands about this machine: verify, env, bench."""

from pathlib import Path
from typing import Annotated

import typer

from fireopd_jax.cli.app import app
from fireopd_jax.commands.bench import bench

app.add_typer(bench, name="bench")


@app.command()
def verify(
    file: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
) -> None:
    """Check objectives and statistics on this machine against NumPy; exit status 1 on failure."""
    from fireopd_jax.runtime.xla_flags import several_cpu_devices

    several_cpu_devices()
    from fireopd_jax.verify.command import verify

    if not verify(file):
        raise typer.Exit(1)


@app.command()
def env() -> None:
    """Print versions, machine and devices as JSON, for bug reports."""
    from fireopd_jax.commands.env import show

    show()


@app.command(hidden=True)
def schema(out: Annotated[Path, typer.Argument()]) -> None:
    """Write the JSON schema of the configuration, used by `keys` and by editors."""
    from fireopd_jax.commands.schema import write

    write(out)
