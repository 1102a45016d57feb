"""The command that serves a model."""

from typing import Annotated

import typer

from fireopd_jax.cli.app import app
from fireopd_jax.cli.options import (
    AnyModel,
    Dtype,
    IgnoredKeys,
    OfRun,
    Slots,
    Template,
    Tensor,
    comma_separated,
    known_dtype,
)


@app.command()
def serve(
    model: AnyModel,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 8000,
    model_id: Annotated[
        str | None, typer.Option("--name", help="Model id in the API; by default MODEL.")
    ] = None,
    name: OfRun = "student",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longest prompt and response; by default the model's, at most 4096."
        ),
    ] = None,
    slots: Slots = None,
    queue: Annotated[
        int, typer.Option(min=1, help="Open responses and scores, beyond which clients must wait.")
    ] = 1024,
    chat_template: Template = None,
    dtype: Dtype = None,
    tensor: Tensor = 1,
    ignore_config_keys: IgnoredKeys = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API: texts, and log-probs of given tokens.

    If FIREOPD_SERVE_KEY is set, clients must send it as their API key.
    """
    from fireopd_jax.commands.serve import ServeCommand

    settings = ServeCommand(
        model=model,
        name=name,
        host=host,
        port=port,
        model_id=model_id,
        max_tokens=max_tokens,
        slots=slots,
        queue=queue,
        chat_template=chat_template,
        dtype=known_dtype(dtype),
        tensor=tensor,
        ignore_config_keys=comma_separated(ignore_config_keys),
    )
    settings.run()
