"""`fireopd env`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from fireopd_jax.runs.folder import environment
from fireopd_jax.runtime.compilation import cache_folder
from fireopd_jax.runtime.devices import advice, described


def show() -> None:
    """Print versions, machine, devices and cache as JSON; advice goes to stderr."""
    found = environment([str(device) for device in jax.devices()])
    print(json.dumps(found | {"machine": described(), "cache": cache()}, indent=2))
    for line in advice():
        print(f"fireopd: {line}", file=sys.stderr)


def cache() -> dict[str, Any]:
    """Return the folder of compiled programs, and whether it can be written."""
    folder = cache_folder()
    return {"folder": str(folder), "writable": is_writable(folder)}


def is_writable(folder: Path) -> bool:
    """Return whether files can be made in a folder, which need not exist yet; makes nothing."""
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
