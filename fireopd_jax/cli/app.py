"""The typer application, which the other modules add their commands to."""

from typing import Annotated

import typer

app = typer.Typer(
    name="fireopd",
    help="On-policy distillation of language models, native to JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool | None) -> None:
    if wanted:
        from importlib.metadata import version  # slow to import

        print(f"fireopd {version('fireopd-jax')}")
        raise typer.Exit


@app.callback()
def fireopd(
    version: Annotated[
        bool | None,
        typer.Option("--version", "-V", is_eager=True, callback=_version, help="Print it, exit."),
    ] = None,
) -> None:
    """On-policy distillation of language models, native to JAX."""
