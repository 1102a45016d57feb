"""Files that are whole or absent, and values as JSON can hold them.

This module does not import JAX.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fireopd_jax.config import UserError
from fireopd_jax.runtime.limits import read_json
from fireopd_jax.runtime.processes import leads


def write_atomically(path: Path, text: str) -> None:
    """Write under another name, flush to disk, rename: a reader sees the old file or the new.

    Of several processes of a run only the leader writes.
    """
    if not leads():
        return
    beside = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if error.filename is None:  # such as of a full disk: the command line names the file
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def recorded(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run; raise UserError for a damaged one."""
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    else:
        if isinstance(found, dict):
            return found
        reason = "not an object"
    raise UserError(f"{file}: damaged ({reason}); delete it, a resumed run writes it again")


def plain(value: Any) -> Any:
    """Return a copy of `value` for JSON: NumPy values as Python's, non-finite numbers as strings.

    These are "nan", "inf" or "-inf", which `float` accepts.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
