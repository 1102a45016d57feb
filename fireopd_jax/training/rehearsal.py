"""What a run would do, without doing it: every check that needs no weights, and the run in words.

Config -> Setup, checked -> lines for `--dry-run`

A run begins with the same checks, before it makes its folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from fireopd_jax.data.identity import check_rows, recorded_rows
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.recipe.paths import absolute
from fireopd_jax.recipe.schema import Config, as_tree, methods
from fireopd_jax.runs.folder import state_of
from fireopd_jax.session.exporting import check_exportable
from fireopd_jax.session.fits import check_pages, check_training_batches
from fireopd_jax.session.setup import Setup, set_up
from fireopd_jax.terminal.safe import one_line
from fireopd_jax.terminal.working import LONG_S, working
from fireopd_jax.training.continuing import Continuation
from fireopd_jax.training.prepare import check_trainable


def checked(config: Config, moment: str | None = None) -> Setup:
    """Return the setup of a run; raise UserError for whatever does not fit. No file is written."""
    with working("reading the data and the tokenizers", after=LONG_S):
        setup = set_up(config, moment)
    check_training_batches(config, setup.mesh, drawing(setup))
    for opened in setup.sets:
        width, longest = opened.encoded.max_prompt_tokens, opened.settings.max_tokens
        check_pages(config, setup.mesh, config.eval_batch_size, width, longest)
    check_trainable(setup.student, setup.teachers)
    if config.run.export:
        check_exportable(setup.student)
    return setup


def drawing(setup: Setup) -> dict[str, DecoderConfig]:
    """Return the models that responses are sampled from, by name: student, and teachers if any."""
    own = setup.config.student.sft
    copied = own is not None and own.source == "teacher"
    rewriting = any(method.refine.asks_teacher for method in methods(setup.config))
    teachers = setup.teachers if setup.config.eval.problems or copied or rewriting else ()
    return {spec.name: spec.model.config for spec in (setup.student, *teachers)}


def in_words(
    work: Literal["train", "sft"], config: Config, setup: Setup, extend: bool = False
) -> Iterator[str]:
    """Yield what a run would do: rows, models, steps, and the folder it would write."""
    yield from (f"data: {note}" for note in setup.data_notes)
    for spec in (setup.student, *setup.teachers):
        count = parameter_count(spec.model.shapes())
        path = spec.config.path or "made at random"
        yield f"{spec.name}: {path}, {count:,} parameters, tokenizer {spec.tokenizer_name}"
    for served in setup.served:
        yield f"teacher {served.name}: served at {served.served.base}"
    yield f"rows: {rows_in_words(setup)}"
    place = folder_in_words(config, setup, extend)
    if work == "sft":
        yield f"would train on references only, and write {place}"
        return
    run, rollout = config.run, config.rollout
    prompts = rollout.batch_size // rollout.group_size
    epochs = run.steps * prompts / max(len(setup.train), 1)
    most = rollout.batch_size * rollout.max_tokens
    controls = f", and as many for each of {', '.join(run.compare)}" if run.compare else ""
    yield (
        f"would run {run.steps} steps of {rollout.batch_size} responses to {prompts} prompts "
        f"({epochs:.2g} epochs){controls}; up to {most:,} tokens a step; and write {place}"
    )


def rows_in_words(setup: Setup) -> str:
    """Return the numbers of rows that are trained on, held out and dropped, and those by route."""
    names = [spec.name for spec in setup.teachers] or [f"teacher {s.name}" for s in setup.served]
    routes = np.bincount(setup.encoded.route[setup.train], minlength=len(names))
    by_route = ", ".join(f"{count} of {n}" for n, count in zip(names, routes, strict=False))
    routed = f" ({by_route})" if len(names) > 1 else ""
    dropped = len(setup.rows) - len(setup.train) - len(setup.held_out)
    return (
        f"{len(setup.rows)}, {len(setup.train)} to train on{routed}, {len(setup.held_out)} held "
        f"out, {dropped} dropped"
    )


def folder_in_words(config: Config, setup: Setup, extend: bool = False) -> str:
    """Return the folder that a run would write, and what is there now.

    Raises UserError for a folder that the run would refuse.
    """
    config = absolute(config, Path.cwd())
    path = Path(config.run.dir or ".").expanduser()
    state = state_of(config.run, as_tree(config), Continuation(path, extend))
    if state == "resume" and (recorded := recorded_rows(path)) is not None:
        check_rows(setup.rows, recorded, path)
    if config.run.dir is None:
        return f"{one_line(f'runs/{config.run.name}')} (with a number if it exists)"
    folder = one_line(str(Path(config.run.dir).expanduser()))
    if state == "complete":
        return f"nothing: {folder} is complete"
    return f"{folder}, where it resumes" if state == "resume" else folder
