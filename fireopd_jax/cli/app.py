"""The typer application, which the other modules add their commands to."""

import typer

app = typer.Typer(
    name="fireopd",
    help="On-policy distillation of language models, native to JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
