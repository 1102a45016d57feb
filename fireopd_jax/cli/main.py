"""The entry point `fireopd`."""

import os
import sys

# The order is that of the help.
from fireopd_jax.cli import machine, models, serving, training  # noqa: F401
from fireopd_jax.cli.app import app
from fireopd_jax.config import UserError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# transformers is used for tokenizers only; silence its warning that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Run the command line; a `UserError` is one line on stderr and its exit status."""
    from fireopd_jax.runtime.warnings import warnings_on_stderr
    from fireopd_jax.runtime.xla_flags import compile_quickly_on_cpu

    compile_quickly_on_cpu()
    try:
        with warnings_on_stderr():
            app()
    except UserError as error:
        print(f"fireopd: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("fireopd: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "Interrupted":
            raise
        print(f"fireopd: {error}", file=sys.stderr)
        sys.exit(130)
