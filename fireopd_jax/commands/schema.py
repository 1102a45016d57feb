"""`fireopd schema`, for developers: the keys of the configuration as a JSON schema."""

import json
from pathlib import Path

from pydantic import TypeAdapter

from fireopd_jax.recipe.schema import Config


def text() -> str:
    """Return the JSON schema of the config classes as text."""
    return json.dumps(TypeAdapter(Config).json_schema(), indent=1, ensure_ascii=False) + "\n"


def write(out: Path) -> None:
    """Write the JSON schema to a file."""
    try:
        out.write_text(text(), encoding="utf-8")
    except OSError as error:  # such as of a full disk
        error.filename = error.filename or str(out)
        raise
