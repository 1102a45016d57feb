"""`fireopd train` and `fireopd sft`."""

import sys
from collections.abc import Sequence
from typing import Literal

import yaml

from fireopd_jax.recipe.keys import check_layers
from fireopd_jax.recipe.layers import read_layers


def launch(
    work: Literal["train", "sft"], settings: Sequence[str], dry_run: bool, extend: bool = False
) -> None:
    """Resolve the configuration, then print it if `dry_run`, else run the command."""
    # A mistyped key is reported before JAX, transformers and Orbax are imported.
    check_layers(read_layers(settings))
    from fireopd_jax.recipe.schema import as_tree, load

    loaded = load(settings)
    if dry_run:
        print(*loaded.notes, sep="\n", file=sys.stderr)
        print(yaml.safe_dump(as_tree(loaded.config), sort_keys=False), end="")
        return
    from fireopd_jax.training import run

    getattr(run, work)(loaded.config, loaded.notes, extend=extend)
