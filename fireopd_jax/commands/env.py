"""`fireopd env`."""

import json

import jax

from fireopd_jax.runs.folder import environment


def show() -> None:
    """Print versions, machine and devices as JSON."""
    print(json.dumps(environment([str(device) for device in jax.devices()]), indent=2))
