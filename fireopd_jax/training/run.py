"""A whole run: make or read the models, distil, evaluate before and after, sum up.

    Config -> run folder -> teachers, student -> distil (and each control) -> summary.json

Every finished model is written to `models/`, so an interrupted run repeats no finished work.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fireopd_jax.evaluation.evaluator import EvalResult
from fireopd_jax.models.architecture import DecoderConfig
from fireopd_jax.models.decoder import parameter_count
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.schema import Config, MethodConfig, as_tree, with_method
from fireopd_jax.runs.folder import environment, is_complete, open_run
from fireopd_jax.runs.report import print_curve, print_results, write_card
from fireopd_jax.runs.tracking import Log
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.runtime.signals import Interrupted, stop_on_signal
from fireopd_jax.session.exporting import check_exportable, export
from fireopd_jax.session.fits import check_training_batches
from fireopd_jax.session.session import Session
from fireopd_jax.session.setup import ModelSpec, Setup, set_up
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.prepare import check_learners, make_student, make_teacher, once, read_base

Summary = dict[str, Any]

SHOWN_IDS = 24
SHOWN_TEXT = 400


def train(config: Config) -> Summary:
    """Do the run that `config` describes, or go on with it; return its summary.

    Raises `UserError` for a mistake in the configuration or the data, and `Interrupted` when a
    signal stopped the run after a save.
    """
    return _in_folder(config, _train, "summary.json")


def sft(config: Config) -> Summary:
    """Do the supervised part alone: the teachers and the student's cold start.

    The run stays open: `train` on the same folder goes on from there.
    """
    return _in_folder(config, _sft, "sft.json")


def _in_folder(config: Config, work: Callable[[Session], Summary], record: str) -> Summary:
    start = time.monotonic()
    compile_cache(config.run.compilation_cache)
    # Mistakes in the data must not leave a run folder behind.
    setup = None if is_complete(config.run) else set_up(config)
    if setup is not None:
        check_training_batches(config, setup.mesh, drawing(setup))
        check_learners(setup.student, setup.teachers)
        if config.run.export:
            check_exportable(setup.student)
    with open_run(config.run, as_tree(config)) as folder:
        if setup is None or folder.state == "complete":
            print(f"{folder.path}: this run is complete, nothing is left to do")
            return json.loads(folder.summary.read_text(encoding="utf-8"))
        with stop_on_signal() as stop, Log(folder.logs) as log:
            log(f"{'resuming' if folder.state == 'resume' else 'writing'} {folder.path}")
            folder.write_json("env.json", environment([str(d) for d in jax.devices()]))
            session = Session(setup, folder, stop, log)
            introduce(session)
            try:
                summary = work(session)
            except Interrupted as stopped:
                raise Interrupted(f"{stopped}; go on with run.dir={folder.path}") from None
            summary |= {"seconds": round(time.monotonic() - start, 1)}
            folder.write_json(record, summary)
            log(f"done in {summary['seconds']:.0f} s: {folder.path / record}")
    return summary


def drawing(setup: Setup) -> dict[str, DecoderConfig]:
    """Name the models that answer prompts: the student, and teachers that are graded or copied."""
    own = setup.config.student.sft
    copied = own is not None and own.source == "teacher"
    teachers = setup.teachers if setup.config.eval.problems or copied else ()
    return {spec.name: spec.model.config for spec in (setup.student, *teachers)}


def introduce(session: Session) -> None:
    """Say what goes in: models, rows, what was dropped, one prompt as the models see it."""
    setup, log = session.setup, session.log
    for spec in (setup.student, *setup.teachers):
        shapes = jax.eval_shape(spec.model.init, jax.random.key(0))
        log(f"{spec.name}: {parameter_count(shapes):,} parameters, tokenizer {spec.tokenizer_name}")
    encoded = setup.encoded
    log(
        f"data: {len(setup.rows)} rows, {len(setup.train)} to train on, {len(setup.held_out)} held"
        f" out; {encoded.dropped_prompts} prompts longer than {encoded.max_prompt_tokens} tokens"
        f" dropped; {encoded.dropped_references} references longer than"
        f" {encoded.max_reference_tokens} not used"
    )
    log(reading(setup.student, encoded.prompts[int(encoded.kept[0])]))
    for index, spec in enumerate(setup.teachers):
        for row in setup.own_rows(encoded.kept, index)[:1]:
            log(reading(spec, encoded.teacher_prompts[int(row)]))


def reading(spec: ModelSpec, ids: np.ndarray) -> str:
    """Show a prompt as a model reads it: its text, and its ids as far as they fit a few lines."""
    text = repr(spec.tokenizer.decode(ids))
    if len(text) > SHOWN_TEXT:
        text = f"{text[: SHOWN_TEXT // 2]} ... {text[-SHOWN_TEXT // 2 :]}"
    shown = " ".join(map(str, ids[:SHOWN_IDS])) + (" ..." if len(ids) > SHOWN_IDS else "")
    stop = ", ".join(map(str, spec.tokenizer.convert_ids_to_tokens(list(spec.stop))))
    return f"{spec.name} reads {text}, {len(ids)} tokens: {shown}; its answers end with {stop}"


def _prepare(session: Session) -> tuple[list[Params], Params, Summary]:
    """Make the models and grade them before distillation."""
    setup = session.setup
    teachers = [make_teacher(session, index) for index in range(len(setup.teachers))]
    student = make_student(session, teachers)
    if not setup.config.eval.problems:
        return teachers, student, {}
    summary = {
        "teacher": by_teacher(session, session.evaluate_teachers(teachers)),
        "student_before": session.evaluate(setup.student, student, "student_before").summary(),
    }
    return teachers, student, summary


def _sft(session: Session) -> Summary:
    _, student, summary = _prepare(session)
    print_results(session.folder.path, session.setup.config, summary)
    return summary | {"params_sha256": params_sha256(student)}


def _train(session: Session) -> Summary:
    config = session.setup.config
    teachers, start, summary = _prepare(session)
    base = read_base(session)

    def distil(method: MethodConfig, home: Any, name: str) -> Params:
        return once(
            session,
            session.setup.student,
            name,
            lambda _: Distillation(session, method, teachers, start, base, home, name).run(),
        )

    student = distil(config.method, session.folder.path, "student")
    exported = session.folder.path / "models" / "student_hf"
    if config.run.export and not exported.exists():
        export(exported, session.setup.student, student, session.folder.path)
    others = {
        name: distil(
            with_method(config, name).method, session.folder.path / "controls" / name, name
        )
        for name in config.run.compare
    }
    if config.eval.problems:
        spec = session.setup.student
        summary["student_after"] = session.evaluate(spec, student, "student_after").summary()
        summary["controls"] = {
            name: session.evaluate(spec, params, f"control_{name}").summary()
            for name, params in others.items()
        }
    summary |= {"steps": config.run.steps, "params_sha256": params_sha256(student)}
    print_results(session.folder.path, session.setup.config, summary)
    print_curve(session.folder.path, config, session.log)
    write_card(session.folder, config, summary)
    return summary


def by_teacher(session: Session, results: Sequence[EvalResult]) -> Mapping[str, Any]:
    """Give one teacher's figures, or those of several by name."""
    if len(results) == 1:
        return results[0].summary()
    names = session.setup.config.teachers
    return {name: result.summary() for name, result in zip(names, results, strict=True)}


def params_sha256(params: Params) -> str:
    """Hash all parameters: names, shapes, types and bits, in the order of their names."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
