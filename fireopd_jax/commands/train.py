"""`fireopd train` and `fireopd sft`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal

from fireopd_jax.config import UserError
from fireopd_jax.recipe.keys import check_layers
from fireopd_jax.recipe.layers import read_layers
from fireopd_jax.runs.trackers.reporting import check_installed
from fireopd_jax.runtime.processes import join
from fireopd_jax.runtime.yaml_core import dump
from fireopd_jax.terminal.record import recording, say

Work = Literal["train", "sft"]


def launch(
    work: Work,
    settings: Sequence[str],
    dry_run: bool,
    full: bool = False,
    extend: bool = False,
    distributed: bool = False,
) -> None:
    """Check the configuration, then run the command; if `dry_run`, print what it would do.

    `distributed`: this is one of several processes of the run.
    """
    # A mistyped key is reported before JAX, transformers and Orbax are imported.
    check_layers(read_layers(settings))
    if full and not dry_run:
        raise UserError("--full: only with --dry-run, which prints every key with it")
    if dry_run:
        rehearse(work, settings, full, extend)
        return
    join(distributed)
    with recording():
        from fireopd_jax.runtime.devices import first_line

        # Before the other imports, which take seconds.
        say(first_line())
        from fireopd_jax.recipe.schema import load
        from fireopd_jax.terminal.working import working

        loaded = load(settings)
        with working("loading the libraries", after=2.0):
            from fireopd_jax.training import run

        getattr(run, work)(loaded.config, loaded.notes, extend=extend)


def rehearse(work: Work, settings: Sequence[str], full: bool, extend: bool = False) -> None:
    """Check all that can be checked without weights; print the configuration to stdout as YAML.

    Notes, and what the run would do, go to stderr. No file is written. Raises UserError.
    """
    from fireopd_jax.recipe.difference import difference
    from fireopd_jax.recipe.schema import as_tree, load

    loaded = load(settings)
    check_installed(loaded.config.run.report_to)
    print(*loaded.notes, sep="\n", file=sys.stderr, flush=True)
    from fireopd_jax.training.rehearsal import checked, in_words

    setup = checked(loaded.config)
    # As a run records it: with the steps that its epochs make.
    config = dataclasses.replace(loaded.config, run=setup.config.run)
    would = list(in_words(work, config, setup, extend))
    tree = as_tree(config) if full else difference(config)
    print(dump(tree), end="", flush=True)
    print(*would, sep="\n", file=sys.stderr)
