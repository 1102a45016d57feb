"""The command line: arguments and help; the commands are implemented in `commands/`.

    app         the typer application            training    train, resume, sft, data, keys, schema
    options     options of several commands      models      eval, generate, chat, export
    main        errors as one line               serving     serve
                                                 machine     verify, env, bench

Large dependencies are imported only when a command needs them, so that `--help`, `keys` and the
error for a mistyped key are printed at once.
"""

from fireopd_jax.cli.main import app, main

__all__ = ["app", "main"]
